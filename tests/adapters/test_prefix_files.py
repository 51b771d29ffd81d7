"""What is written, what is read, and what is wrong with it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from prefix_tiny import CASES, IDS, LAYERS, P, given_past, prefix_rows, prefixed, run, tiny
from safetensors.numpy import save_file

from peft_deploy.adapters.formats.prefix import PrefixAdapter, read_prefix, write_prefix
from peft_deploy.adapters.prefix import PrefixConfig, PrefixModelForCausalLM
from peft_deploy.adapters.provenance import PROVENANCE_NAME, Provenance
from peft_deploy.config import PrefixConfigError
from peft_deploy.errors import AdapterError, CheckpointError, OutputError
from peft_deploy.signature import past_names

WEIGHTS = "prefix_model_state.pdparams"
CACHES = "pre_caches.npy"
PROJECTION = {"prefix_projection": True, "prefix_projection_hidden_size": 24}


def load(folder: Path, name: str = "llama", **options: Any) -> PrefixModelForCausalLM:
    return PrefixModelForCausalLM.from_pretrained(tiny(name), folder, **options).eval()


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the weight file, and removes the cache that would contradict it."""
    path = str(folder / WEIGHTS)
    state = paddle.load(path, return_numpy=True)
    change(state)
    paddle.save(state, path)
    (folder / CACHES).unlink(missing_ok=True)


@pytest.fixture(params=[{}, PROJECTION], ids=["plain", "projection"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    prefixed(**request.param).save_pretrained(tmp_path / "prefix")
    return tmp_path / "prefix"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["plain", "projection"])
def test_save_and_load(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = prefixed(name, **options)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, name)
    np.testing.assert_array_equal(run(loaded), run(model))
    assert loaded.prefix_config == model.prefix_config
    assert not loaded.prefix_encoder[0].weight.stop_gradient
    assert loaded.model.lm_head.weight.stop_gradient if name == "llama" else True


def test_the_files(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        [PROVENANCE_NAME, CACHES, "prefix_config.json", WEIGHTS]
    )
    config = json.loads((saved / "prefix_config.json").read_text())
    assert list(config) == sorted(config) and config["multi_query_group_num"] == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["plain", "projection"])
@pytest.mark.parametrize("name", CASES)
def test_pre_caches_hold_what_the_model_sees(
    name: str, options: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    """Without dropout and behind the projection, in either mode; read without Paddle, too."""
    model = prefixed(name, prefix_dropout=0.5, **options)
    getattr(model, mode)()
    model.save_pretrained(tmp_path)
    assert model.training == (mode == "train")
    caches = np.load(tmp_path / CACHES)
    np.testing.assert_allclose(caches, prefix_rows(model), rtol=1e-5, atol=1e-5)
    read = read_prefix(tmp_path)
    assert (read.num_layers, read.num_tokens) == (LAYERS, P)
    assert (read.num_kv_heads, read.head_dim) == (CASES[name].kv_heads, CASES[name].head_dim)
    past = read.past_key_values()
    assert [half.shape for pair in past for half in pair] == [
        (1, CASES[name].kv_heads, P, CASES[name].head_dim)
    ] * (2 * LAYERS)
    np.testing.assert_array_equal(np.array(past)[:, :, 0], caches)
    assert list(read.named_past()) == past_names(LAYERS)
    if not CASES[name].takes_a_past:
        return
    given = given_past(name, np.array(past)[:, :, 0], len(IDS))
    np.testing.assert_allclose(run(model.model.eval(), **given), run(model.eval()), atol=2e-5)


def test_a_prefix_is_read_without_paddle(saved: Path) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('paddle', 'paddlenlp'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from pathlib import Path\n"
        "from peft_deploy.adapters.formats.prefix import read_prefix\n"
        "import numpy as np\n"
        "folder = Path(sys.argv[1])\n"
        "found = read_prefix(folder).pre_caches()\n"
        "assert np.abs(found - np.load(folder / 'pre_caches.npy')).max() < 1e-5\n"
        "assert np.abs(found).max() > 0.5\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_written_prefix_is_the_read_one(saved: Path, tmp_path: Path) -> None:
    first = read_prefix(saved)
    copied = PrefixAdapter(tmp_path / "copy", first.config, first.state, first.provenance)
    assert write_prefix(copied) == tmp_path / "copy" / WEIGHTS
    second = read_prefix(tmp_path / "copy")
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(run(load(tmp_path / "copy")), run(load(saved)))
    changed = {n: a + np.float32(1e-3) * (n == "0.weight") for n, a in first.state.items()}
    assert PrefixAdapter(saved, first.config, changed).fingerprint != first.fingerprint


@pytest.mark.parametrize("sharded", [True, False])
def test_safetensors_of_a_unified_checkpoint(saved: Path, sharded: bool) -> None:
    wanted = run(load(saved))
    state = paddle.load(str(saved / WEIGHTS), return_numpy=True)
    name = "peft_model-00001-of-00001.safetensors" if sharded else "peft_model.safetensors"
    save_file({n: np.ascontiguousarray(a) for n, a in state.items()}, saved / name)
    if sharded:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, name)}
        (saved / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match="more than one set of adapter weights"):
        load(saved)
    (saved / WEIGHTS).unlink()
    np.testing.assert_array_equal(run(load(saved)), wanted)


def test_a_variant(tmp_path: Path) -> None:
    model = prefixed()
    model.save_pretrained(tmp_path, variant="best")
    assert (tmp_path / "prefix_model_state.best.pdparams").is_file()
    np.testing.assert_array_equal(run(load(tmp_path, variant="best")), run(model))
    with pytest.raises(AdapterError, match="no adapter weights"):
        load(tmp_path)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    prefixed().save_pretrained(tmp_path, is_main_process=False, max_shard_size="1GB")
    assert not any(tmp_path.iterdir())


def test_weights_that_are_missing_are_an_error(saved: Path) -> None:
    """The reference starts from scratch without a word."""
    (saved / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"no adapter weights.*\n(.*\n)*  {WEIGHTS}"):
        load(saved)
    with pytest.raises(AdapterError, match="does not exist"):
        load(saved / "nowhere")
    with pytest.raises(AdapterError, match="is a file"):
        load(saved / CACHES)
    (saved / "prefix_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no prefix_config\.json"):
        load(saved)


def test_keys_that_are_missing_or_unexpected_are_listed(saved: Path) -> None:
    edit(saved, lambda s: s.update({"0.bias": s["0.weight"][0], "7.weight": s["0.weight"]}))
    with pytest.raises(AdapterError, match=r"unexpected:\n  0\.bias\n  7\.weight$"):
        load(saved)
    edit(saved, lambda s: [s.pop(name) for name in list(s) if name != "7.weight"])
    with pytest.raises(AdapterError, match=r"missing:\n  0\.weight"):
        load(saved)


def test_a_projection_that_only_one_of_config_and_weights_has(tmp_path: Path) -> None:
    prefixed(**PROJECTION).save_pretrained(tmp_path)
    path = tmp_path / "prefix_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prefix_projection": False}))
    with pytest.raises(AdapterError, match=r"prefix_projection False\nunexpected:\n  1\.bias"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "cut"),
    [("0.weight", np.s_[:2]), ("0.weight", np.s_[:, :-1]), ("0.weight", np.s_[0])],
)
def test_tensors_of_another_shape(saved: Path, name: str, cut: Any) -> None:
    edit(saved, lambda s: s.update({name: s[name][cut]}))
    with pytest.raises(AdapterError, match=f"of another shape.*\n(.*\n)*  {name}: "):
        load(saved)


@pytest.mark.parametrize("name", ["1.weight", "1.bias", "3.weight", "3.bias"])
def test_projections_of_another_shape(name: str, tmp_path: Path) -> None:
    prefixed(**PROJECTION).save_pretrained(tmp_path)
    edit(tmp_path, lambda s: s.update({name: s[name][..., 2:]}))
    with pytest.raises(AdapterError, match=f"  {name}: "):
        load(tmp_path)


def test_a_prefix_of_another_model(saved: Path) -> None:
    model = tiny("llama", num_hidden_layers=3)
    trained = [p.stop_gradient for p in model.parameters()]
    with pytest.raises(PrefixConfigError, match="num_hidden_layers is 2, but the model's is 3"):
        PrefixModelForCausalLM.from_pretrained(model, saved)
    assert [p.stop_gradient for p in model.parameters()] == trained
    wide = tiny("llama", hidden_size=64)
    with pytest.raises(PrefixConfigError, match="hidden_size is 32, but the model's is 64"):
        PrefixModelForCausalLM.from_pretrained(wide, saved)
    path = saved / "prefix_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 64}))
    with pytest.raises(AdapterError, match=r"does not fit the model:\n  .*, .* for this model"):
        PrefixModelForCausalLM.from_pretrained(wide, saved)
    assert not any(p.stop_gradient for p in wide.parameters())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(value: float, saved: Path, tmp_path: Path) -> None:
    def spoil(state: dict[str, Any]) -> None:
        state["0.weight"][0, 0] = value

    edit(saved, spoil)
    with pytest.raises(AdapterError, match=r"NaN or infinity in:\n  0\.weight"):
        load(saved)
    model = prefixed()
    with paddle.no_grad():
        model.prefix_encoder[0].weight[1, 2] = value
    with pytest.raises(AdapterError, match=r"not saved: NaN or infinity in:\n  0\.weight"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prefix_that_overflows_is_not_saved(tmp_path: Path) -> None:
    state = {
        "0.weight": np.ones((P, 16), np.float16),
        "1.weight": np.ones((16, 24), np.float16),
        "1.bias": np.ones(24, np.float16),
        "3.weight": np.full((24, 64), 6e4, np.float16),
        "3.bias": np.ones(64, np.float16),
    }
    sizes = {"num_attention_heads": 4, "multi_query_group_num": 2, "num_hidden_layers": 2}
    config = PrefixConfig(num_prefix_tokens=P, hidden_size=32, **sizes, **PROJECTION)
    with (
        pytest.raises(AdapterError, match="not all finite in float16"),
        np.errstate(over="ignore"),
    ):
        write_prefix(PrefixAdapter(tmp_path / "out", config, state))
    assert not (tmp_path / "out").exists()


def test_pre_caches_that_contradict_the_weights(saved: Path) -> None:
    caches = np.load(saved / CACHES)
    np.save(saved / CACHES, caches + 1e-7)
    load(saved)
    for wrong, text in (
        (caches * 1.01, "differs from what the weights beside it give"),
        (caches[:, ::-1], "differs from"),
        (np.where(caches > 0, caches, 0), "differs from"),
        (caches[:1], r"holds float32 \[1, 2, 2, 3, 8\]"),
        (np.full_like(caches, np.nan), "differs from"),
    ):
        np.save(saved / CACHES, wrong)
        with pytest.raises(AdapterError, match=text):
            load(saved)
    (saved / CACHES).write_bytes(b"no array")
    with pytest.raises(AdapterError, match="cannot be read"):
        load(saved)
    (saved / CACHES).unlink()
    load(saved)


def test_files_that_would_run_code_are_refused(saved: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (touched,)

    (saved / WEIGHTS).write_bytes(pickle.dumps({"0.weight": Evil()}))
    with pytest.raises(CheckpointError):
        load(saved)
    np.save(saved / CACHES, np.array([Evil()], dtype=object), allow_pickle=True)
    prefixed().save_pretrained(saved / "other")
    (saved / CACHES).replace(saved / "other" / CACHES)
    with pytest.raises(AdapterError, match="cannot be read"):
        load(saved / "other")
    assert not touched.exists()


def test_parts_of_tensor_parallel_ranks_are_refused(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "prefix_model_state.tp00.pdparams")
    with pytest.raises(AdapterError, match=r"single parallel ranks:\n  prefix_model_state\.tp00"):
        load(saved)
    (saved / "prefix_model_state.tp00.pdparams").rename(saved / WEIGHTS)
    path = saved / "prefix_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tensor_parallel_degree": 2}))
    with pytest.raises(AdapterError, match="tensor_parallel_degree 2"):
        load(saved)


def test_sizes_that_the_file_does_not_say(saved: Path) -> None:
    path = saved / "prefix_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": None}))
    with pytest.raises(AdapterError, match="does not say num_hidden_layers"):
        read_prefix(saved)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        prefixed().save_pretrained(tmp_path / "file")


def test_where_a_prefix_comes_from(saved: Path) -> None:
    found = Provenance.load(saved)
    assert found is not None and len(found.base_weights) == 8 and not found.merged
    assert all("norm" not in name for name in found.base_weights)
    load(saved)  # warnings are errors here
    other = tiny("llama", seed=3)
    with pytest.warns(UserWarning, match="not the one that the prefix was trained on"):
        PrefixModelForCausalLM.from_pretrained(other, saved)


def test_nothing_temporary_is_left(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = prefixed(seed=4, **({} if len(load(saved).prefix_encoder) == 2 else PROJECTION))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pickle.dump", full)
    with pytest.raises(OutputError, match="No space left"):
        model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_model_of_unknown_kind_saves_and_loads(tmp_path: Path) -> None:
    class Mean(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.weight = self.create_parameter([2, 2])

        def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
            return past_key_values.mean([1, 2])

    sizes = {"num_attention_heads": 2, "num_hidden_layers": 3, "hidden_size": 8}
    base = Mean()
    model = PrefixModelForCausalLM(base, PrefixConfig(num_prefix_tokens=P, **sizes), lambda p: p)
    model.save_pretrained(tmp_path)
    loaded = PrefixModelForCausalLM.from_pretrained(base, tmp_path, lambda p: p)
    np.testing.assert_array_equal(run(loaded), run(model))
    assert np.abs(run(model)).max() > 0
