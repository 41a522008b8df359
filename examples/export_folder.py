"""A guided folder: exported once, then decoded by people who only know transformers.

Run: python examples/export_folder.py [LANGUAGE_MODEL REWARD]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

PROMPT = "The best way to learn to swim is"
models = ["--lm", sys.argv[1], "--reward", sys.argv[2]] if len(sys.argv) > 2 else []

with tempfile.TemporaryDirectory() as scratch:
    folder = str(Path(scratch) / "guided")
    guidance = ["--k", "8", "--beta", "8", "--temperature", "0"]
    command = ["export", *models, "--output", folder, *guidance]
    subprocess.run([sys.executable, "-m", "rgtg_fast", *command], check=True)

    # From here on nothing names our package: transformers runs the folder's own generate().
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print("guided:  ", tokenizer.decode(model.generate(**inputs, max_new_tokens=24)[0]))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    print("unguided:", tokenizer.decode(plain.generate(**inputs, max_new_tokens=24)[0]))
    pipe = pipeline("text-generation", folder, trust_remote_code=True)
    print("pipeline:", pipe(PROMPT, max_new_tokens=24, do_sample=False)[0]["generated_text"])
