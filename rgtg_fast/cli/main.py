"""The command line `rgtg-fast`: demo, generate, explain, train, accuracy, evaluate, bench, env.

User errors are one line on stderr and exit code 2. Heavy imports happen inside the commands: help is instant.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rgtg_fast.cli.terminal import (
    complain,
    console,
    note,
    print_json,
    print_line,
    read_stdin,
    status,
    streams,
)
from rgtg_fast.errors import RGTGError
from rgtg_fast.files import check_writable, reason, write_text

USER_ERROR, INTERRUPTED = 2, 130
# click's UsageError, whether typer brings its own click or depends on one.
UsageError: Any = typer.BadParameter.__mro__[1]


class _OneLineErrors(TyperGroup):
    """Turns every error that a user can cause into one line on stderr and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        ended: list[int] = []
        try:
            with streams(), _ended_by_signals(ended):
                code = super().main(
                    args,
                    prog_name=prog_name,
                    complete_var=complete_var,
                    standalone_mode=False,
                    windows_expand_args=windows_expand_args,
                    **extra,
                )
        except UsageError as error:
            message = error.format_message().rstrip(".")
            # Without a command the help is shown, and that is all there is to say.
            code = _fail(f"{message}: see `{_command(error)} --help`") if message else USER_ERROR
        except RGTGError as error:
            code = _fail(str(error))
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            if _is_out_of_memory(error):
                code = _fail(
                    "out of memory: use a smaller --max-batch, --max-length or --k, or --dtype bfloat16"
                )
            elif isinstance(error, OSError):
                # Every file that a command is about has a message of its own; this is for the others.
                at = "" if error.filename is None else f" ({error.filename})"
                code = _fail(f"{reason(error)}{at}: check the path, the permissions and the room on the disk")
            else:
                raise
        code = 128 + ended[0] if ended else code if isinstance(code, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code


@contextlib.contextmanager
def _ended_by_signals(ended: list[int]) -> Iterator[None]:
    """Ends a command as an interrupt does, in order, where the system asks for it or the terminal is closed.

    Args:
        ended: gets the signal's number.
    """

    def end(number: int, frame: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # What is ignored, as by nohup, stays ignored.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command(error: Any) -> str:
    return (
        "rgtg-fast" if error.ctx is None or error.ctx.parent is None else f"rgtg-fast {error.ctx.info_name}"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for CUDA alone; others raise a RuntimeError, an OSError or an ImportError."""
    text = str(error).lower()
    texts = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(part in text for part in texts)


def _fail(message: str) -> int:
    complain(message)
    return USER_ERROR


app = typer.Typer(
    cls=_OneLineErrors,
    name="rgtg-fast",
    help="Reward-guided text generation: a reward model steers every token, at nearly ordinary speed.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

MODELS, GUIDANCE, LENGTH, OUTPUT = "Models", "Guidance", "Length and batch", "Output"
TRAINING_DATA, OBJECTIVE, TRAINED, STEPS = "Data", "Objective", "What is trained", "Steps"

LM = Annotated[
    str | None,
    typer.Option(
        help="Language model: path or hub id.",
        show_default="the embedded SmolLM2-135M-Instruct",
        rich_help_panel=MODELS,
    ),
]
Reward = Annotated[
    str | None,
    typer.Option(
        help="Reward model: path or hub id, or `bundled:pargs`; after a method's name and a colon for another guide "
        "(`farma:PATH`, `genarm:PATH`, `rad:PATH`, `eft:TUNED,UNTUNED`, `text:PATH`, "
        "`mixture:0.7*pargs:PATH+0.3*contrastive`: see `rgtg-fast methods`); `contrastive` guides with the language "
        "model itself under a better and a worse system prompt; `none` is the language model alone.",
        show_default="bundled:pargs for the default model, else contrastive",
        rich_help_panel=MODELS,
    ),
]
Better = Annotated[
    str | None, typer.Option(help="System prompt to move towards (contrastive).", rich_help_panel=MODELS)
]
Worse = Annotated[
    str | None, typer.Option(help="System prompt to move away from (contrastive).", rich_help_panel=MODELS)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16 or float64.",
        show_default="float32 on a CPU, bfloat16 on a GPU",
        rich_help_panel=MODELS,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda.", show_default="cuda where there is one", rich_help_panel=MODELS),
]
Engine = Annotated[
    str, typer.Option(help="auto, native (fused C++ layers) or transformers.", rich_help_panel=MODELS)
]
Graphs = Annotated[
    bool | None,
    typer.Option(
        "--graphs/--no-graphs",
        help="Replay each step as one CUDA graph.",
        show_default="on a GPU, where the guide stays on it",
        rich_help_panel=MODELS,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the models' blocks (torch.compile, --engine transformers): tens of seconds at first, faster "
        "steps on a GPU.",
        rich_help_panel=MODELS,
    ),
]
PadBatch = Annotated[
    bool,
    typer.Option(
        "--pad-batch",
        help="Run --max-batch rows in every step, empty ones where there are fewer: on a GPU an answer then has the "
        "same bits in any batch.",
        rich_help_panel=MODELS,
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat/--no-chat",
        help="Wrap a plain prompt as a user message where the model has a chat template.",
        rich_help_panel=MODELS,
    ),
]
K = Annotated[int, typer.Option("--k", help="Candidates per token.", rich_help_panel=GUIDANCE)]
Beta = Annotated[
    float, typer.Option(help="Weight of the reward; 0 is the base model.", rich_help_panel=GUIDANCE)
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=GUIDANCE)]
Support = Annotated[
    str,
    typer.Option(
        help="Where candidates come from: lm, combined or all (the whole vocabulary).",
        rich_help_panel=GUIDANCE,
    ),
]
GateEntropy = Annotated[
    float | None,
    typer.Option(
        help="Guide only where the language model's entropy is at least this, in nats.",
        show_default="everywhere",
        rich_help_panel=GUIDANCE,
    ),
]
Strategy = Annotated[
    str,
    typer.Option(
        help="How the models are spent: tokenwise, `best_of_n:n=8`, `segment:target=8.5` or `blockwise:k=4,length=16` "
        "(settings behind the colon; see `rgtg-fast methods`).",
        rich_help_panel=GUIDANCE,
    ),
]
Seed = Annotated[
    int, typer.Option(help="Seed; the same seed and prompt give the same answer.", rich_help_panel=GUIDANCE)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text (repeatable).", rich_help_panel=LENGTH),
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.", rich_help_panel=LENGTH)]
MaxBatch = Annotated[int, typer.Option(help="Prompts decoded at once.", rich_help_panel=LENGTH)]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens of prompt and answer at most.", show_default="what the job needs", rich_help_panel=LENGTH
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else on stdout.", rich_help_panel=OUTPUT)
]

# What training reward models and training policies have in common.
EvalData = Annotated[
    str | None,
    typer.Option(
        help="Pairs to evaluate on.", show_default="--held-out of --data", rich_help_panel=TRAINING_DATA
    ),
]
HeldOut = Annotated[
    float, typer.Option(help="Share of --data to evaluate on, by prompt.", rich_help_panel=TRAINING_DATA)
]
PairLength = Annotated[
    int, typer.Option(help="Tokens of a prompt and its longer answer.", rich_help_panel=TRAINING_DATA)
]
MinAnswerTokens = Annotated[
    int, typer.Option(help="Drop pairs with a shorter answer.", rich_help_panel=TRAINING_DATA)
]
AnswersEnded = Annotated[
    str,
    typer.Option(
        help="Whether answers ended: auto by the data's finish_reason (by default they did), or yes or no for all. One "
        "that was cut gets no end token and is read at its last text token.",
        rich_help_panel=TRAINING_DATA,
    ),
]
LoraRank = Annotated[int, typer.Option(help="Rank of the adapters.", rich_help_panel=TRAINED)]
LoraAlpha = Annotated[
    float, typer.Option(help="Adapters are scaled by alpha / rank.", rich_help_panel=TRAINED)
]
LoraDropout = Annotated[float, typer.Option(help="Dropout before the adapters.", rich_help_panel=TRAINED)]
FullTraining = Annotated[
    bool, typer.Option("--full", help="Train the weights, not adapters.", rich_help_panel=TRAINED)
]
LearningRate = Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=STEPS)]
WeightDecay = Annotated[float, typer.Option(help="Weight decay.", rich_help_panel=STEPS)]
HalfPrecision = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.", rich_help_panel=STEPS)]
GradientCheckpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Less memory for more time.", rich_help_panel=STEPS),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on from the last checkpoint in --output.", rich_help_panel=OUTPUT),
]
SaveSteps = Annotated[int, typer.Option(help="Steps between checkpoints.", min=1, rich_help_panel=OUTPUT)]
LogSteps = Annotated[int, typer.Option(help="Steps between lines of the log.", min=1, rich_help_panel=OUTPUT)]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        help="Where transformers' Trainer reports: tensorboard, wandb, … (repeatable).",
        rich_help_panel=OUTPUT,
    ),
]
MergeTo = Annotated[
    Path | None,
    typer.Option(
        help="Also write a whole model with the adapters merged to this folder.", rich_help_panel=OUTPUT
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from rgtg_fast import __version__

        print_line(f"rgtg-fast {__version__}")
        raise typer.Exit


@app.command()
def demo(
    prompt: Annotated[list[str] | None, typer.Option(help="Your own prompt (repeatable).")] = None,
    lm: LM = None,
    reward: Reward = None,
    better: Better = None,
    worse: Worse = None,
    dtype: Dtype = None,
    device: Device = None,
    engine: Engine = "auto",
    k: K = 10,
    beta: Annotated[
        float | None,
        typer.Option(
            help="Weight of the reward; 0 is the base model.",
            show_default="5, contrastive 2",
            rich_help_panel=GUIDANCE,
        ),
    ] = None,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 48,
    json: Json = False,
) -> None:
    """Answer a few prompts without and with the guide, side by side."""
    from rgtg_fast.app import demo as demonstration
    from rgtg_fast.cli.session import NONE, Setup, as_chat, default_reward
    from rgtg_fast.config import Guidance

    reward = default_reward(lm, better, worse) if reward is None else reward
    if reward == NONE:
        raise RGTGError("the demo compares with and without a guide: --reward none leaves nothing to compare")
    if beta is None:
        beta = demonstration.default_beta(reward)
    guidance = Guidance(k, beta, temperature)
    texts = prompt or list(demonstration.PROMPTS)
    setup = Setup(lm, reward, better, worse, dtype, device, engine, max_batch=len(texts))
    with status("Loading") as progress:
        pair = setup.pair(progress)
        decoder = setup.decoder(progress, pair)
        unguided = replace(setup, reward=NONE, better=None, worse=None).decoder(progress, pair)
        prompts = [as_chat(text, decoder, chat=True) for text in texts]
        progress(f"Answering {len(prompts)} prompts, without and with the guide")
        report = demonstration.run(decoder, unguided, prompts, max_new_tokens, guidance, seed)
    if json:
        print_json(report.as_dict())
    else:
        demonstration.show(report, console())


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; `-` reads it from stdin.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help='Prompts as JSON Lines (plain or gzip): {"prompt": text, chat or token ids} with optional '
            "id, seed, k, beta, temperature, weights, gate_entropy.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where finished rows go, each at once, as JSON Lines.", rich_help_panel=OUTPUT),
    ] = None,
    field: Annotated[
        str, typer.Option(help="The name of the prompt's field in --input.", rich_help_panel=OUTPUT)
    ] = "prompt",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue a broken run: keep the rows of --output.", rich_help_panel=OUTPUT
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where --output has rows.", rich_help_panel=OUTPUT)
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print tokens as they come.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    lm: LM = None,
    reward: Reward = None,
    better: Better = None,
    worse: Worse = None,
    dtype: Dtype = None,
    device: Device = None,
    engine: Engine = "auto",
    graphs: Graphs = None,
    compile: Compile = False,
    pad_batch: PadBatch = False,
    chat: Chat = True,
    k: K = 10,
    beta: Beta = 1.0,
    temperature: Temperature = 1.0,
    support: Support = "lm",
    gate_entropy: GateEntropy = None,
    strategy: Strategy = "tokenwise",
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 128,
    stop: Stop = None,
    max_batch: MaxBatch = 8,
    max_length: MaxLength = None,
) -> None:
    """Answer one prompt, or a file of prompts."""
    from rgtg_fast.cli.generate import answer_many, answer_one, stream_one
    from rgtg_fast.cli.jobs import AnswerFile, Job, check_prompt, read_prompts
    from rgtg_fast.cli.session import Setup, default_reward
    from rgtg_fast.config import Guidance

    if (prompt is None) == (input is None):
        raise RGTGError(
            "give one prompt or --input with a file of prompts" + (", not both" if prompt is not None else "")
        )
    if stream and input is not None:
        raise RGTGError("--stream shows one answer as it comes: give one prompt instead of --input")
    if stream and output is not None:
        raise RGTGError("--stream prints to stdout: leave out --output")
    if (resume or overwrite) and output is None:
        raise RGTGError("--resume and --overwrite are about --output: name it")
    if resume and overwrite:
        raise RGTGError("--resume keeps the rows of --output and --overwrite drops them: choose one")
    tokenwise = strategy == "tokenwise"
    if stream and not tokenwise:
        raise RGTGError("--stream shows tokens as they are chosen: leave out --strategy")
    # A strategy samples the base model by settings of its own, of which the temperature has an option too.
    guidance = Guidance(gate_entropy=gate_entropy)
    if tokenwise:
        guidance = Guidance(k, beta, temperature, support, gate_entropy=gate_entropy)
    if not tokenwise and "temperature=" not in strategy:
        strategy += f"{',' if ':' in strategy else ':'}temperature={temperature}"
    one = input is None
    if max_batch < 1:
        raise RGTGError(f"max_batch={max_batch} leaves no row: use at least 1")
    reward = default_reward(lm, better, worse, support) if reward is None else reward
    rows = 1 if one and not pad_batch else max_batch
    setup = Setup(
        lm, reward, better, worse, dtype, device, engine, rows, max_length, graphs, compile, pad_batch
    )
    broken = 0
    if input is None:
        text = read_stdin() if prompt == "-" else prompt
        check_prompt(text)
        assert text is not None
        jobs = [Job(1, text, guidance, seed)]
    else:
        jobs, broken = read_prompts(input, guidance, seed, field, complain)
    run = {**setup.names(), "max_new_tokens": max_new_tokens, "stop": stop or [], "chat": chat}
    if not tokenwise:
        jobs = [replace(job, strategy=strategy) for job in jobs]
    answers = None if output is None else AnswerFile(output, resume, overwrite, input)
    with contextlib.nullcontext() if answers is None else answers:
        if answers is not None:
            jobs = answers.remaining(jobs, run)
        try:
            if stream:
                stream_one(setup, jobs[0], run, json)
            elif one and answers is None:
                answer_one(setup, jobs[0], run, json)
            elif jobs:
                broken += answer_many(setup, jobs, run, answers)
        except KeyboardInterrupt:
            if answers is not None:
                note(f"interrupted: {len(answers.done)} finished rows are in {answers.path}, use --resume")
            raise
        if answers is not None:
            answers.check_place()
            note(f"{len(answers.done)} rows in {answers.path}" + (f", {broken} left out" if broken else ""))
        # Where no prompt could be answered, rows that were to be overwritten stay.
        if broken:
            raise typer.Exit(USER_ERROR)


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from stdin.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained HTML page here.", rich_help_panel=OUTPUT)
    ] = None,
    show: Annotated[
        int | None,
        typer.Option(
            help="Candidates of each token in the table.", show_default="all", min=1, rich_help_panel=OUTPUT
        ),
    ] = None,
    json: Json = False,
    lm: LM = None,
    reward: Reward = None,
    better: Better = None,
    worse: Worse = None,
    dtype: Dtype = None,
    device: Device = None,
    engine: Engine = "auto",
    chat: Chat = True,
    k: K = 10,
    beta: Beta = 1.0,
    temperature: Temperature = 1.0,
    support: Support = "lm",
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 24,
    stop: Stop = None,
    max_length: MaxLength = None,
) -> None:
    """Show every token's candidates: log-probability, reward, final probability, and which was chosen."""
    from rgtg_fast.app import explain as explanation
    from rgtg_fast.cli.jobs import check_prompt
    from rgtg_fast.cli.session import Setup, as_chat, decode_with, default_reward
    from rgtg_fast.config import Guidance

    text = read_stdin() if prompt == "-" else prompt
    check_prompt(text)
    guidance = Guidance(k, beta, temperature, support)
    reward = default_reward(lm, better, worse, support) if reward is None else reward
    setup = Setup(lm, reward, better, worse, dtype, device, engine, 1, max_length)
    if html is not None:
        check_writable(html)
    with status("Loading") as progress:
        decoder = setup.decoder(progress)
        progress("Answering")
        result = decoder.generate(
            [as_chat(text, decoder, chat)],
            max_new_tokens=max_new_tokens,
            guidance=guidance,
            seed=seed,
            stop=stop,
            trace=True,
        )
    row = result[0]
    steps, decode = row.trace or [], decode_with(decoder)
    settings = {
        "k": guidance.k,
        "beta": guidance.beta,
        "temperature": guidance.temperature,
        "support": support,
        "seed": seed,
    }
    if html is not None:
        facts = {
            "model": setup.names()["lm"],
            "reward": reward,
            **{name: str(value) for name, value in settings.items()},
        }
        write_text(html, explanation.page(text, steps, decode, facts))
    if json:
        answer = {"text": row.text, "finish_reason": row.finish_reason, "reward": row.reward}
        steps_as_json = [explanation.as_dict(step) for step in steps]
        print_json({"prompt": text, **setup.names(), **settings, **answer, "steps": steps_as_json})
        return
    out = console()
    out.print(explanation.table(steps, show))
    out.print()
    out.print(explanation.marked_answer(steps, decode))
    if html is not None:
        note(f"written: {html}")


@app.command()
def bench(
    lm: LM = None,
    rm: Annotated[
        str | None,
        typer.Option(
            "--rm",
            "--reward",
            help="Reward model: path or hub id, or an adapter of the language model (a folder, bundled:NAME).",
            show_default="the language model with a random reward head",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Sizes of models with random weights, in place of --lm: smollm2-135m, llama-1b or llama-8b."
        ),
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    k: Annotated[int, typer.Option("--k", help="Candidates per token.")] = 10,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Timed runs of each method; the median is told.")] = 3,
    device: Device = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods to time, separated by commas: ours, ours_transformers, ours_eager (no CUDA graphs), "
            "ours_compiled (torch.compile), shared_trunk, shared_compiled, two_models, args_replicated, pargs_serial, "
            "unguided (transformers' own loop), ours_unguided, ours_unguided_compiled; guided by a second language "
            "model: ours_genarm, genarm_published."
        ),
    ] = "ours,args_replicated,pargs_serial,unguided",
    seed: Annotated[int, typer.Option(help="Seed of the weights and prompts.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="torch's own number")
    ] = None,
    json: Json = False,
) -> None:
    """Time our decoder against the published algorithms, in one run, outputs compared first."""
    from rgtg_fast.app import bench as benchmark

    names = [name.strip() for name in methods.split(",") if name.strip()]
    options = {"lm": lm, "rm": rm, "shape": shape, "prompt_length": prompt_length, "k": k, "batch": batch}
    options |= {"new_tokens": new_tokens, "dtype": dtype, "methods": names, "repeats": repeats}
    options |= {"seed": seed, "threads": threads, "device": device}
    benchmark.run(options, json)


@app.command()
def methods(json: Json = False) -> None:
    """List the guides: formula, paper, what a token costs, how `--reward` names them."""
    from rgtg_fast.app import methods as table

    if json:
        print_json(table.report())
    else:
        table.show(console())


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(
            help="Preference pairs: .jsonl, .json, .csv (also .gz), .parquet, or a data set of Hugging Face.",
            rich_help_panel=TRAINING_DATA,
        ),
    ],
    output: Annotated[Path, typer.Option(help="New folder for the reward model.", rich_help_panel=OUTPUT)],
    model: Annotated[
        str | None,
        typer.Option(
            help="Language model to make the reward model from: path or hub id.",
            show_default="the embedded SmolLM2-135M-Instruct",
            rich_help_panel=MODELS,
        ),
    ] = None,
    eval_data: EvalData = None,
    held_out: HeldOut = 0.1,
    limit: Annotated[
        int | None,
        typer.Option(help="Pairs to take at most.", show_default="all", rich_help_panel=TRAINING_DATA),
    ] = None,
    max_length: PairLength = 512,
    min_answer_tokens: MinAnswerTokens = 0,
    answers_ended: AnswersEnded = "auto",
    objective: Annotated[
        str,
        typer.Option(
            help="partial_bt (PARGS), full_bt (ARGS, judges), cd_fudge, rad, farma or genarm.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "partial_bt",
    mode: Annotated[
        str,
        typer.Option(
            help="Past the shorter answer's end: repeat_last repeats its last reward, eos pads it with eos, truncate "
            "stops.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "repeat_last",
    weight: Annotated[
        str, typer.Option(help="Every prefix counts the same, or every pair.", rich_help_panel=OBJECTIVE)
    ] = "prefix",
    beta_r: Annotated[
        float, typer.Option(help="genarm: scale of the log-probabilities.", rich_help_panel=OBJECTIVE)
    ] = 0.05,
    stop_gradient: Annotated[
        bool,
        typer.Option(
            "--stop-gradient",
            help="farma: the best next reward is a target without a gradient.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            help="cd_fudge, rad: reward model (path, hub id, bundled:NAME) whose rewards are learned.",
            show_default="the data's chosen_reward and rejected_reward, or 1 and 0",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    fork_layer: Annotated[
        int,
        typer.Option(
            help="Train from this layer on; the layers below run once over the data and are cached.",
            rich_help_panel=TRAINED,
        ),
    ] = 0,
    lora_rank: LoraRank = 16,
    lora_alpha: LoraAlpha = 32.0,
    lora_dropout: LoraDropout = 0.0,
    full: FullTraining = False,
    trunk_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the activations below --fork-layer.",
            show_default="in the user's cache folder",
            rich_help_panel=TRAINED,
        ),
    ] = None,
    no_trunk_cache: Annotated[
        bool,
        typer.Option(
            "--no-trunk-cache",
            help="Run the layers below --fork-layer in every step, for want of disk.",
            rich_help_panel=TRAINED,
        ),
    ] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.", rich_help_panel=STEPS)] = 1.0,
    lr: LearningRate = 2e-4,
    head_lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of the trained head.", show_default="--lr", rich_help_panel=STEPS),
    ] = None,
    head_fit: Annotated[
        float | None,
        typer.Option(
            help="Fit the score head on the frozen model first, with a penalty of this strength, for example 0.3.",
            show_default="begin with zeros",
            rich_help_panel=STEPS,
        ),
    ] = None,
    weight_decay: WeightDecay = 0.0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a packed row.", rich_help_panel=STEPS)] = 2048,
    accumulate: Annotated[int, typer.Option(help="Rows of an optimizer step.", rich_help_panel=STEPS)] = 4,
    bf16: HalfPrecision = False,
    gradient_checkpointing: GradientCheckpointing = False,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    save_steps: SaveSteps = 50,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations.", show_default="at the end", min=1, rich_help_panel=OUTPUT
        ),
    ] = None,
    log_steps: LogSteps = 10,
    report_to: ReportTo = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw the held-out accuracy by prefix length (.png, .svg, .pdf).", rich_help_panel=OUTPUT
        ),
    ] = None,
    merge: MergeTo = None,
    json: Json = False,
) -> None:
    """Train a reward model on preference pairs."""
    from rgtg_fast.cli import train as training

    recipe = {
        "objective": objective,
        "mode": mode,
        "weight": weight,
        "beta_r": beta_r,
        "stop_gradient": stop_gradient,
        "judge": judge,
        "fork_layer": fork_layer,
        "full": full,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "num_train_epochs": epochs,
        "learning_rate": lr,
        "head_learning_rate": head_lr,
        "head_fit": head_fit,
        "weight_decay": weight_decay,
        "token_budget": batch_tokens,
        "gradient_accumulation_steps": accumulate,
        "max_length": max_length,
        "min_answer_tokens": min_answer_tokens,
        "answers_ended": answers_ended,
        "held_out": held_out,
        "limit": limit,
        "bf16": bf16,
        "gradient_checkpointing": gradient_checkpointing,
        "seed": seed,
    }
    options = {
        "eval_data": eval_data,
        "resume": resume,
        "merged": merge,
        "save_steps": save_steps,
        "eval_steps": eval_steps,
        "logging_steps": log_steps,
        "cache_trunk": not no_trunk_cache,
        "report_to": report_to or "none",
        "device": device,
    }
    training.run(model, data, output, recipe, options, trunk_cache, figure, json)


@app.command("train-policy")
def train_policy(
    data: Annotated[
        str,
        typer.Option(
            help="Preference pairs: .jsonl, .json, .csv (also .gz), .parquet, or a data set of Hugging Face; for rloo "
            "rows with a prompt.",
            rich_help_panel=TRAINING_DATA,
        ),
    ],
    output: Annotated[Path, typer.Option(help="New folder for the policy.", rich_help_panel=OUTPUT)],
    model: Annotated[
        str | None,
        typer.Option(
            help="Language model to begin with, which is the reference: path or hub id.",
            show_default="the embedded SmolLM2-135M-Instruct",
            rich_help_panel=MODELS,
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="What rloo maximises: path or hub id of a reward model or adapter, or `bundled:NAME`.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    eval_data: EvalData = None,
    held_out: HeldOut = 0.1,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Pairs or prompts to take at most.", show_default="all", rich_help_panel=TRAINING_DATA
        ),
    ] = None,
    max_length: PairLength = 512,
    min_answer_tokens: MinAnswerTokens = 0,
    answers_ended: AnswersEnded = "auto",
    objective: Annotated[
        str, typer.Option(help="dpo, simpo, treg, treg_simpo or rloo.", rich_help_panel=OBJECTIVE)
    ] = "dpo",
    beta: Annotated[
        float | None,
        typer.Option(
            help="Weight of the preference loss; for rloo of the KL divergence.",
            show_default="0.1; simpo 2; rloo 0.05",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    margin: Annotated[float, typer.Option(help="SimPO's margin.", rich_help_panel=OBJECTIVE)] = 1.0,
    alpha: Annotated[
        float, typer.Option(help="Weight of T-REG's regulariser.", rich_help_panel=OBJECTIVE)
    ] = 0.25,
    templates: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with T-REG's contrastive prompts.",
            show_default="the project's own",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    token_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the reference's log-probabilities and token rewards, computed once.",
            show_default="in the user's cache folder",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Answers to a prompt (rloo).", rich_help_panel=OBJECTIVE)] = 4,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer (rloo).", rich_help_panel=OBJECTIVE)
    ] = 64,
    temperature: Annotated[
        float, typer.Option(help="Of the answers (rloo).", rich_help_panel=OBJECTIVE)
    ] = 1.0,
    iterations: Annotated[
        int,
        typer.Option(
            help="Steps on the same answers, with PPO's clipped ratio (rloo).", rich_help_panel=OBJECTIVE
        ),
    ] = 1,
    fork_layer: Annotated[int, typer.Option(help="Train from this layer on.", rich_help_panel=TRAINED)] = 0,
    lora_rank: LoraRank = 16,
    lora_alpha: LoraAlpha = 32.0,
    lora_dropout: LoraDropout = 0.0,
    full: FullTraining = False,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=STEPS)] = 1.0,
    lr: LearningRate = 5e-5,
    weight_decay: WeightDecay = 0.0,
    batch: Annotated[
        int, typer.Option(help="Pairs (rloo: answers) of a forward.", rich_help_panel=STEPS)
    ] = 4,
    accumulate: Annotated[
        int, typer.Option(help="Forwards of an optimizer step.", rich_help_panel=STEPS)
    ] = 4,
    bf16: HalfPrecision = False,
    gradient_checkpointing: GradientCheckpointing = False,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    save_steps: SaveSteps = 50,
    log_steps: LogSteps = 10,
    report_to: ReportTo = None,
    merge: MergeTo = None,
    json: Json = False,
) -> None:
    """Train the language model itself on preferences: DPO, SimPO, T-REG or RLOO, by TRL."""
    from rgtg_fast.cli import train_policy as training

    recipe = {
        "objective": objective,
        "beta": beta,
        "margin": margin,
        "alpha": alpha,
        "fork_layer": fork_layer,
        "full": full,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "num_train_epochs": epochs,
        "learning_rate": lr,
        "weight_decay": weight_decay,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_length": max_length,
        "min_answer_tokens": min_answer_tokens,
        "answers_ended": answers_ended,
        "held_out": held_out,
        "limit": limit,
        "num_generations": samples,
        "max_completion_length": max_new_tokens,
        "temperature": temperature,
        "num_iterations": iterations,
        "bf16": bf16,
        "gradient_checkpointing": gradient_checkpointing,
        "seed": seed,
    }
    options = {
        "eval_data": eval_data,
        "reward": reward,
        "resume": resume,
        "merged": merge,
        "save_steps": save_steps,
        "logging_steps": log_steps,
        "report_to": report_to or "none",
        "device": device,
    }
    training.run(model, data, output, recipe, options, templates, token_cache, json)


@app.command("token-rewards")
def token_rewards(
    prompt: Annotated[str, typer.Argument(help="The question, or a dialogue in HH-RLHF's turns.")],
    answer: Annotated[str, typer.Argument(help="The answer to judge; `-` reads it from stdin.")],
    templates: Annotated[
        Path | None,
        typer.Option(help="YAML file with the contrastive prompts.", show_default="the project's own"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained HTML page here.", rich_help_panel=OUTPUT)
    ] = None,
    json: Json = False,
    lm: LM = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Show what T-REG's contrastive prompts make of every token of an answer."""
    from rgtg_fast.app import token_rewards as rewards
    from rgtg_fast.cli.session import Setup

    if html is not None:
        check_writable(html, templates)
    setup = Setup(lm, dtype=dtype, device=device)
    text = read_stdin() if answer == "-" else answer
    tokens = rewards.compute(setup, prompt, text, templates)
    model = setup.names()["lm"]
    if html is not None:
        facts = {"model": model, "templates": "the project's own" if templates is None else templates.name}
        write_text(html, rewards.page(prompt, tokens, facts))
    if json:
        print_json(rewards.report(prompt, text, model, tokens))
        return
    console().print(rewards.coloured(tokens))
    if html is not None:
        note(f"written: {html}")


@app.command()
def accuracy(
    reward: Annotated[
        list[str],
        typer.Option(
            help="Guide, as in the other commands: path or hub id of a reward model or adapter, `bundled:NAME`, "
            "`text:PATH`, `contrastive`, … (repeatable, to compare guides).",
            rich_help_panel=MODELS,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Preference pairs: .jsonl, .json, .csv (also .gz), .parquet, or a data set of Hugging Face.",
            rich_help_panel=TRAINING_DATA,
        ),
    ],
    fractions: Annotated[
        str, typer.Option(help="Shares of each answer to judge by, separated by commas.")
    ] = "0.1,0.25,0.5,0.75,1",
    layout: Annotated[
        str,
        typer.Option(help="plain, dialogue, tldr, or auto by the fields.", rich_help_panel=TRAINING_DATA),
    ] = "auto",
    limit: Annotated[
        int | None,
        typer.Option(help="Pairs to take at most.", show_default="all", min=1, rich_help_panel=TRAINING_DATA),
    ] = None,
    max_length: Annotated[
        int,
        typer.Option(
            help="Tokens of a prompt and its longer answer; longer prompts lose their beginning.",
            rich_help_panel=TRAINING_DATA,
        ),
    ] = 1024,
    answers_ended: AnswersEnded = "auto",
    chat: Chat = True,
    lm: LM = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a packed row.")] = 2048,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the curves to this .png, .svg or .pdf.", rich_help_panel=OUTPUT)
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Write the rewards of each pair to this .jsonl file as they come; what is in it is not computed "
            "again, so that an interrupted run goes on.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Judge guides by preference pairs: how often the chosen answer wins, by the share of it that is read."""
    from rgtg_fast.app import accuracy as judging

    pairs = judging.Data(data, layout, limit, max_length, batch_tokens, chat, keep, answers_ended)
    models = {"lm": lm, "dtype": dtype, "device": device}
    judging.run(reward, pairs, fractions, models, figure, json)


@app.command()
def evaluate(
    config: Annotated[Path, typer.Option(help="The study: a YAML file (see docs/evaluation.md).")],
    output: Annotated[
        str | None,
        typer.Option(help="Folder of the results.", show_default="the file's", rich_help_panel=OUTPUT),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Prompts to take at most.", show_default="the file's", min=1, rich_help_panel=LENGTH
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to take, separated by commas; the baseline always is.",
            show_default="all of the file",
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compare decoding methods: answers, judges, intervals, one table and one report; continues where it stopped."""
    from rgtg_fast.app import evaluate as study

    study.run(config, {"output": output, "limit": limit, "device": device}, methods, json)


@app.command()
def env(json: Json = False) -> None:
    """Tell versions, device, extension and which backend serves which op: paste it into a bug report."""
    from rgtg_fast.app import environment
    from rgtg_fast.cli.session import quiet

    quiet()
    report = environment.collect()
    if json:
        print_json(report)
        return
    lines = environment.lines(report)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print_line(f"{name:<{width}}  {value}")


def main(args: Sequence[str] | None = None) -> None:
    """The console script."""
    app(args)


if __name__ == "__main__":
    main()
