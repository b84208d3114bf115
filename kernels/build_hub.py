"""Build the kernels for the Hugging Face Kernel Hub: `python kernels/build_hub.py OUT`.

OUT/build/torch-{cuda,rocm,cpu}/ each hold the package's files and a metadata.json; `kernels.get_local_kernel(OUT)`
loads the one for the torch that runs (on a CPU the kernels run in Triton's interpreter, TRITON_INTERPRET=1). The files
are the same for every backend: Triton compiles them where they run.

Source of the layout: kernels 0.17.2, `kernels/resolver.py` and `kernels/importer.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE / "fastrl_kernels"
NAME = "fastrl-kernels"
VERSION = 1  # of the kernel on the Hub: add 1 with every change of what __all__ offers, additions included
LICENSE = "Apache-2.0"
BACKENDS = ("cuda", "rocm", "cpu")

CARD = f"""---
library_name: kernels
license: {LICENSE.lower()}
---

# {NAME}

Triton kernels for policy-gradient losses of language models: log-probs and entropies, GRPO / PPO losses and their
gradients, group advantages, generalised advantage estimation, ranking losses. Tensors in, tensors out; the package
`fastrl` puts autograd and trainers on top.

```python
from kernels import get_local_kernel

kernel = get_local_kernel(path_to_this_folder)
print(kernel.__all__)
```
"""


def sources() -> list[Path]:
    """The package's files, in a fixed order."""
    return sorted(PACKAGE.glob("*.py"))


def metadata(backend: str, digest: str) -> dict[str, object]:
    """What `kernels` reads of a variant; `id` is the name that the module gets, one for each version and backend."""
    return {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest[:8]}",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
    }


def build(out: Path) -> list[Path]:
    """Write every variant under `out`, in place of an earlier build; returns their folders."""
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources())).hexdigest()
    variants = []
    for backend in BACKENDS:
        variant = out / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        variant.mkdir(parents=True)
        for path in sources():
            shutil.copyfile(path, variant / path.name)
        (variant / "metadata.json").write_text(json.dumps(metadata(backend, digest), indent=2) + "\n")
        variants.append(variant)
    (out / "README.md").write_text(CARD)
    shutil.copyfile(HERE.parent / "LICENSE", out / "LICENSE")
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write; an artefact, not to be committed")
    for variant in build(parser.parse_args().out):
        print(variant)


if __name__ == "__main__":
    main()
