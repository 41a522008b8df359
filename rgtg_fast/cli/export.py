"""`rgtg-fast export`: a folder that other engines decode guided."""

from dataclasses import dataclass, replace
from pathlib import Path

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.options import include, json_option
from rgtg_fast.cli.session import CONTRASTIVE, NONE, Decoding, Setup
from rgtg_fast.cli.terminal import note, print_json, print_line, status
from rgtg_fast.config import GUIDANCE, OUTPUT, option
from rgtg_fast.errors import RGTGError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a folder with the language model, the reward model and the guidance, which transformers decodes guided.

    `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, then `generate` as for any model. With
    --fold, an ordinary checkpoint for any engine instead, where the reward is linear in the last hidden state.
    """

    json: bool = json_option()
    output: str = option("The folder to write.", panel=OUTPUT)
    overwrite: bool = option("Replace an older folder that this command wrote.", False, OUTPUT)
    fold: bool = option(
        "Write lm_head + beta * W of a head-only reward over the whole vocabulary (farma:PATH) as an ordinary "
        "checkpoint: no cost in any engine, and beta is fixed.",
        False,
        OUTPUT,
    )
    temperature: float | None = option(
        "Temperature in the folder's generation config; 0 is greedy.",
        None,
        GUIDANCE,
        shown="the language model's own",
    )
    setup: Setup = include("lm reward reward_label reward_weights dtype device trust_remote_code engine")
    decoding: Decoding = include("k beta support gate_entropy")

    def run(self) -> None:
        """Writes the folder.

        Raises:
            RGTGError: models that do not fit, or a folder that may not be written.
        """
        setup = self.setup.with_reward(self.decoding.support)
        assert setup.reward is not None
        if setup.reward == NONE:
            raise RGTGError("--reward none leaves nothing to export: name a reward")
        if self.fold:
            self._fold(setup.lm or embedded.NAME, setup)
            return
        from rgtg_fast.integrations.guided_folder import check_target, export_folder, with_own_temperature

        target = Path(self.output)
        check_target(target, self.overwrite, setup.lm, setup.reward)
        guidance = self.decoding.guidance()
        if self.temperature is not None:
            guidance = replace(guidance, temperature=self.temperature)
        with status("Loading") as progress:
            source = setup.source(progress)
            decoder = setup.decoder(progress)
            progress(f"Writing {target}")
            if self.temperature is None:
                guidance = with_own_temperature(guidance, decoder)
            dropped = export_folder(
                decoder,
                source,
                setup.reward,
                target,
                guidance,
                setup.reward_label,
                setup.reward_weights,
                setup.trust_remote_code,
                self.overwrite,
            )
        for setting in dropped:
            note(
                f"{setting} of the language model's generation config has no part in guided decoding: left out"
            )
        if self.json:
            print_json({"output": str(target), "left_out": dropped})
        else:
            print_line(str(target))

    def _fold(self, lm: str, setup: Setup) -> None:
        if setup.reward == CONTRASTIVE:
            raise RGTGError("--fold needs a reward with a vocabulary head: use --reward farma:PATH")
        with status("Loading") as progress:
            source = setup.source(progress)
            from rgtg_fast.integrations.fold import export_folded

            export_folded(source, setup.reward, self.decoding.beta, self.output)
        if self.json:
            print_json({"output": self.output, "left_out": []})
        else:
            print_line(self.output)
