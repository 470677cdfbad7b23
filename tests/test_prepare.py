"""What a run depends on of its models: configuration, tokenizer and weights, no more."""

from pathlib import Path
from typing import Any

from conftest import make_model, save_model
from plugbridge.models import model_files

Raw = dict[str, Any]
OWN = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_only_what_loading_reads_is_of_a_model(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path / "model")
    assert [path.name for path in model_files(folder)] == OWN
    for name in ("NOTES.md", "runs/config/tune/module/model.safetensors", ".hidden/config.json", "pytorch_model.bin",
                 "optimizer.bin", "other.safetensors", "train.py", "generation_config.json"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert [path.name for path in model_files(folder)] == OWN
    assert [path.name for path in model_files(folder, code=True)] == [*OWN, "train.py"]
    (folder / "adapter_config.json").touch()  # which transformers loads into the model
    assert "adapter_config.json" in {path.name for path in model_files(folder)}


def test_weights_are_the_shards_that_the_index_names(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path, max_shard_size="6KB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 1
    (tmp_path / "model-of-before.safetensors").touch()
    assert {path.name for path in model_files(tmp_path)} == {"config.json", "model.safetensors.index.json", *shards}
