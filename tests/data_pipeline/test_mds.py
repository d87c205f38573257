import subprocess
import sys

PROGRAM = """
import sys
from data_pipeline.dataset import PackedDataset
from data_pipeline import prepare
assert "transformers" not in sys.modules and "torchvision" not in sys.modules
import streaming
dataset = streaming.LocalDataset(sys.argv[1])
ours = PackedDataset(sys.argv[1])
assert len(dataset) == len(ours)
assert (dataset[3]["tokens"] == ours[3].tokens).all()
"""


def test_import_is_light_and_leaves_the_library_itself_usable(prepared):
    subprocess.run([sys.executable, "-c", PROGRAM, str(prepared / "train")], check=True, timeout=60)
