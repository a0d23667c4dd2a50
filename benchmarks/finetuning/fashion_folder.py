"""Write Fashion-MNIST as torchvision stores it, so that a recipe needs no download.

`python -m benchmarks.finetuning.fashion_folder FOLDER`, then
`normswap finetune pretrained_small_batch --set data.root=FOLDER`. A file of its own, since the keys of the recorded
evidence follow from `fashion.py`.
"""

import gzip
import shutil
import sys
from pathlib import Path

from benchmarks.finetuning.fashion import locate


def main(root: Path) -> None:
    """Write the four files where torchvision looks for them in a data folder."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for packed in locate().glob("*-ubyte.gz"):
        with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
