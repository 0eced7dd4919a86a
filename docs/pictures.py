"""Draw the pictures of docs/pictures.md: ``python docs/pictures.py``."""

from pathlib import Path

import tensortrain as tt
from tensortrain.formats import WeightShape, get_format

HERE = Path(__file__).parent

if __name__ == "__main__":
    tt.draw(tt.models.MPSClassifier(9, 3, bond_dim=4), path=HERE / "pictures-classifier.png")
    spec = get_format("tucker").spec(WeightShape("linear", 64, 96), rank=(3, 4, 5, 6))
    tt.draw(spec, path=HERE / "pictures-tucker.png")
