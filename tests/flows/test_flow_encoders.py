"""Encoders from end to end: a head trained with LoRA, class names, pooling, and what their bundles refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from model_recipes import load_recipe

import peft_deploy
from peft_deploy.base import open_base
from peft_deploy.bundle import Manifest
from peft_deploy.config.export import ExportOptions
from peft_deploy.environment import require_paddle
from peft_deploy.errors import ConfigError, ExecutionError, UnsupportedModelError
from peft_deploy.runtime import load_bundle

pytestmark = pytest.mark.convert

tiny = load_recipe("tiny")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "ship",
    "came",
    "round",
    "the",
    "point",
    ".",
    "##s",
]
TEXTS = ["a ship", "the ships came round the point .", "a"]


def add_tokenizer(folder: Path) -> None:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    engine = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    engine.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.make(tmp_path_factory.mktemp("encoders") / "base", "bert-classification")
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def trained_head(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA in the encoder, and the head's own weights trained with it; all of it far from where it began."""
    require_paddle("this test")
    import paddle

    from peft_deploy.base.dygraph import load_model

    base = open_base(classifier)
    config = peft_deploy.LoRAConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(base.family.lora_targets),
        trainable_modules=["classifier.*", ".*pooler.*"],
    )
    model = peft_deploy.LoRAModel(load_model(base), config)
    rng = np.random.default_rng(3)
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient:
            spread = 0.3 if "lora" in name else 0.5
            values = rng.normal(0, spread, parameter.shape).astype(np.float32)
            parameter.set_value(paddle.to_tensor(values))
    folder = tmp_path_factory.mktemp("encoders") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(classifier: Path, trained_head: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("encoders") / "bundle"
    peft_deploy.export(classifier, output, adapter=trained_head)
    return output


def test_the_trained_head_is_in_the_bundle(
    classifier: Path, trained_head: Path, bundle: Path
) -> None:
    manifest = Manifest.read(bundle)
    assert manifest.parity is not None and manifest.parity["passed"] is True
    assert manifest.adapters[0]["replaced"] == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    import paddle

    from peft_deploy.base.dygraph import load_model

    model = peft_deploy.LoRAModel.from_pretrained(load_model(open_base(classifier)), trained_head)
    model.eval()
    loaded = load_bundle(bundle)
    for text in TEXTS:
        ids = paddle.to_tensor([loaded.tokenizer.encode(text)])
        with paddle.no_grad():
            want = model(ids)[0].numpy()
            model.disable_lora()
            without = model(ids)[0].numpy()
            model.enable_lora()
        got = loaded.read(text)[0]["logits"]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        assert np.abs(want - without).max() > 0.1


def test_predictions_have_the_models_class_names(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    together, alone = loaded.predict(TEXTS), [loaded.predict(text)[0] for text in TEXTS]
    for one, other in zip(together, alone, strict=True):
        assert set(one.scores) == {"bad", "good", "neither"}
        assert one.label == other.label == max(one.scores, key=lambda name: one.scores[name])
        assert sum(one.scores.values()) == pytest.approx(1)
        assert one.score == pytest.approx(other.score, abs=1e-5)
    pair = loaded.read(("a ship", "the point"))[0]["logits"]
    joined = loaded.read("a ship the point")[0]["logits"]
    assert np.abs(pair - joined).max() > 1e-2  # the second text is another segment


def test_the_bundle_validates_and_says_what_it_cannot_do(
    classifier: Path, trained_head: Path, bundle: Path
) -> None:
    report = peft_deploy.validate(bundle, classifier, adapter=trained_head, seed=3)
    assert report.passed and not report.warnings
    assert report.effect is not None and report.effect.sensitivity < 1e-2
    loaded = load_bundle(bundle)
    with pytest.raises(ExecutionError, match="has no cache"):
        loaded.generate("a ship")
    with pytest.raises(ExecutionError, match="does not give sentence embeddings"):
        loaded.embed(TEXTS)
    with pytest.raises(ConfigError, match="text 0 has 42 tokens; the model can see 40"):
        loaded.predict("ship " * 40)
    assert loaded.predict("ship " * 40, truncate=True) == loaded.predict("ship " * 38)


def test_past_the_position_table_and_all_padding(bundle: Path) -> None:
    runner = load_bundle(bundle).runner
    ids = np.full((2, 41), 5, np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
    with pytest.raises(ExecutionError, match="41 tokens; the model has 40 positions"):
        runner.run(feeds)
    short = {name: array[:, :6].copy() for name, array in feeds.items()}
    want = runner.run(short)["logits"]
    short["attention_mask"][1] = 0
    have = runner.run(short)["logits"]
    assert np.isfinite(have).all()
    np.testing.assert_allclose(have[0], want[0], atol=1e-6)
    short["token_type_ids"][0, 0] = -1
    with pytest.raises(ExecutionError, match="token_type_ids holds the negative value -1"):
        runner.run(short)


def test_a_model_in_memory_with_the_pooling_that_was_asked_for(tmp_path: Path) -> None:
    require_paddle("this test")
    from peft_deploy.base.dygraph import load_model

    base = tiny.make(tmp_path / "base", "bert-embedding")
    adapter = tiny.make_lora(tmp_path / "adapter", base)
    model = peft_deploy.LoRAModel.from_pretrained(load_model(open_base(base, "none")), adapter)
    options = ExportOptions(pooling="cls")
    result = peft_deploy.export(model, tmp_path / "out", options=options)
    assert result.parity is not None and result.parity.passed
    outputs = result.manifest.signature.output_names  # type: ignore[union-attr]
    assert outputs == ["last_hidden_state", "sentence_embedding"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sentence_pooling"] == {"mode": "cls", "normalize": False}
    assert peft_deploy.validate(tmp_path / "out", base, adapter=adapter).passed


def test_pooling_for_a_classifier_is_refused(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BertForSequenceClassification gives no hidden states"):
        peft_deploy.export(
            classifier, tmp_path / "out", options=ExportOptions(pooling="mean", dry_run=True)
        )


def write_modules(folder: Path, pooling: dict[str, object], *more: str) -> None:
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": i, "path": "1_Pooling" if kind == "Pooling" else "", "type": f"s.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_what_a_folder_of_sentence_transformers_says(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "base", "bert-embedding", sentence_pooling=None)
    assert "sentence_embedding" not in _outputs(folder)
    write_modules(folder, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    assert _pooling(folder) == {"mode": "mean", "normalize": False}
    write_modules(folder, {"pooling_mode_cls_token": True}, "Normalize")
    assert _pooling(folder) == {"mode": "cls", "normalize": True}
    assert _pooling(folder, "mean") == {"mode": "mean", "normalize": True}
    assert _pooling(folder, "none") is None
    write_modules(folder, {"pooling_mode": "mean"})
    assert _pooling(folder) == {"mode": "mean", "normalize": False}
    write_modules(folder, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    with pytest.raises(UnsupportedModelError, match="mean_tokens and pooling_mode_max_tokens"):
        open_base(folder)
    write_modules(folder, {"pooling_mode_mean_tokens": True}, "Dense")
    with pytest.raises(UnsupportedModelError, match="module 'Dense'"):
        open_base(folder)
    assert "sentence_embedding" in _outputs(folder, "mean")


def _outputs(folder: Path, pooling: str | None = None) -> list[str]:
    base = open_base(folder, pooling)
    return base.family.signature(base.config).output_names


def _pooling(folder: Path, asked: str | None = None) -> object:
    return open_base(folder, asked).config.get("sentence_pooling")
