"""From an encoder-decoder model and its LoRA adapter to two graphs that read one text and write another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from model_recipes import load_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import peft_deploy
from peft_deploy.bundle import Manifest
from peft_deploy.cli import cli
from peft_deploy.config.export import ExportOptions
from peft_deploy.errors import AdapterError, BundleError, ConfigError, ExecutionError
from peft_deploy.inspection import inspect_bundle
from peft_deploy.runtime import EncoderDecoderRunner, LoadedBundle, Session, load_bundle
from peft_deploy.runtime.opening import open_encoder
from peft_deploy.text import Tokenizer as BundleTokenizer
from peft_deploy.workflows.validate import validate

tiny = load_recipe("tiny")
SOURCES = ("the lamp had burned", "and", "all of the night, until the oil was gone")
START, END = 2, 1
PART = "the encoder alone"

pytestmark = pytest.mark.convert


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token, behind three special ones; a text ends with </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<go>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<go>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.make(tmp_path_factory.mktemp("t5") / "base", "t5", vocab_size=261)
    write_tokenizer(folder)
    generation = {"decoder_start_token_id": START, "eos_token_id": END}
    (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    made: Path = tiny.make_lora(base.with_name("tuned"), base)
    return made


@pytest.fixture(scope="module")
def bundle(base: Path, adapter: Path) -> Path:
    cases, output = base.with_name("cases.txt"), base.with_name("bundle")
    cases.write_text("a case of the user's\nand one more\n", "utf-8")
    options = ExportOptions(record_reference=True, cases=cases)
    result = peft_deploy.export(base, output, adapter=adapter, options=options)
    assert result.parity is not None and result.parity.passed and not result.parity.warnings
    assert list(result.parity.parts) == [PART]
    assert {"distant tokens", "decode with cache"} <= {case.group for case in result.parity.cases}
    return output


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> LoadedBundle:
    return load_bundle(bundle, verify=True)


def greedy(base: Path, adapter: Path, source: Sequence[int], steps: int) -> list[int]:
    """What PaddleNLP's model with the adapter writes, every step from the beginning."""
    import paddle

    from peft_deploy.adapters.lora import LoRAModel
    from peft_deploy.base import open_base
    from peft_deploy.base.dygraph import load_model

    model = LoRAModel.from_pretrained(load_model(open_base(base)), adapter)
    model.eval()
    tokens = [START]
    with paddle.no_grad():
        while len(tokens) <= steps and tokens[-1] != END:
            logits = model(
                input_ids=paddle.to_tensor([list(source)]),
                decoder_input_ids=paddle.to_tensor([tokens]),
                return_dict=False,
            )[0]
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


def test_generation_is_that_of_paddlenlp(loaded: LoadedBundle, base: Path, adapter: Path) -> None:
    tokenizer = BundleTokenizer.from_folder(base)
    results = loaded.generate(list(SOURCES), max_new_tokens=12)
    for text, result in zip(SOURCES, results, strict=True):
        source = tokenizer.encode(text)
        assert source[-1] == END
        assert result.prompt_tokens == len(source)
        assert list(result.token_ids) == greedy(base, adapter, source, 12)
        assert result.text is not None


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_text_in_a_batch_is_answered_as_alone(loaded: LoadedBundle, padding: str) -> None:
    together = loaded.generate(list(SOURCES), max_new_tokens=12, padding=padding)
    alone = [loaded.generate(text, max_new_tokens=12) for text in SOURCES]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_an_end_token_ends_a_row_and_others_go_on(loaded: LoadedBundle) -> None:
    free = loaded.generate(list(SOURCES), max_new_tokens=12)
    runner, tokenizer = loaded.runner, loaded.tokenizer
    assert isinstance(runner, EncoderDecoderRunner)
    from peft_deploy.runtime import GenerationOptions, generate
    from peft_deploy.text.padding import pad_batch

    batch = pad_batch([tokenizer.encode(text) for text in SOURCES], 0)
    stop = free[0].token_ids[0]
    options = GenerationOptions(max_new_tokens=12, stop_ids=(stop,))
    reading = runner.reading(batch.input_ids, batch.attention_mask)
    results = generate(reading, [[START]] * 3, options)
    assert (results[0].token_ids, results[0].finish_reason) == ((stop,), "stop")
    for result, whole in zip(results, free, strict=True):
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]


def test_the_command_answers_a_source_text(bundle: Path, loaded: LoadedBundle) -> None:
    arguments = [
        "generate",
        str(bundle),
        "--prompt",
        SOURCES[0],
        "--max-new-tokens",
        "6",
        "--json",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)["results"][0]
    assert answer["token_ids"] == list(loaded.generate(SOURCES[0], max_new_tokens=6).token_ids)
    assert answer["prompt_tokens"] == len(SOURCES[0]) + 1


def test_each_file_holds_what_its_graph_uses(bundle: Path) -> None:
    used = []
    for folder in (bundle, bundle / "encoder"):
        initializers = ir.load(folder / "model.onnx").graph.initializers
        used.append({name for name in initializers if name.endswith(".weight")})
        external = [v.const_value for v in initializers.values()]
        paths = {t.path for t in external if isinstance(t, ir.ExternalTensor)}
        assert {Path(path).parent.resolve() for path in paths} == {folder.resolve()}
    decoder, encoder = used
    assert decoder & encoder == {"shared.weight"}
    assert "decoder.block.1.layer.1.EncDecAttention.kv.weight" in encoder
    assert not any("EncDecAttention.k" in name for name in decoder)


def test_the_recorded_reference_and_the_model_both_pass(
    bundle: Path, base: Path, adapter: Path
) -> None:
    recorded = validate(bundle)
    assert recorded.passed and list(recorded.parts) == [PART]
    assert any("a case of the user's" in case.name for case in recorded.cases)
    again = validate(bundle, base, adapter=adapter, seed=3)
    assert again.passed and list(again.parts) == [PART]


@pytest.mark.parametrize("name", ["model.onnx.data", "encoder/model.onnx.data"])
def test_a_weight_that_changed_in_either_file_is_found(
    name: str, bundle: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    weights = np.fromfile(broken / name, np.float32)
    largest = int(np.nanargmax(np.abs(weights)))
    weights[largest : largest + 40] *= -1
    weights.tofile(broken / name)
    report = validate(broken)
    assert not report.passed
    assert report.parts[PART].passed == (name == "model.onnx.data")
    problems = inspect_bundle(broken, verify=True).problems
    assert problems == (f"{name} is not the file that the manifest describes",)


def test_inspect_knows_both_graphs(bundle: Path, tmp_path: Path) -> None:
    found = inspect_bundle(bundle, verify=True)
    assert found.problems == ()
    encoder = found.manifest.encoder
    assert encoder is not None and encoder.start_token_id == START
    assert Manifest.read(bundle).encoder == encoder
    result = CliRunner().invoke(cli, ["inspect", str(bundle)])
    assert "begins with 2" in result.output and "encoder.0.key" in result.output
    renamed = shutil.copytree(bundle, tmp_path / "renamed")
    model = ir.load(renamed / "encoder/model.onnx")
    model.graph.outputs[0].name = "other"
    ir.save(model, renamed / "encoder/model.onnx")
    assert any("encoder.0.key" in p for p in inspect_bundle(renamed, verify=True).problems)
    with pytest.raises(BundleError, match=r"encoder\.0\.key"):
        load_bundle(renamed)


def test_without_the_encoder_nothing_is_loaded(bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "encoder/model.onnx").unlink()
    with pytest.raises(BundleError, match=r"encoder/model\.onnx"):
        load_bundle(broken)


def test_a_source_of_nothing_but_padding_gives_numbers(bundle: Path, loaded: LoadedBundle) -> None:
    encoder = open_encoder(bundle, loaded.manifest)
    feeds = {"input_ids": np.full((2, 4), 7), "attention_mask": np.array([[0] * 4, [1] * 4])}
    for values in encoder.run(feeds).values():
        assert np.isfinite(values).all()
    runner = loaded.runner
    assert isinstance(runner, EncoderDecoderRunner)
    with pytest.raises(ConfigError, match="every row must have a token"):
        runner.reading(feeds["input_ids"], feeds["attention_mask"])
    with pytest.raises(ExecutionError, match="the last that the model has is 260"):
        runner.reading(np.full((1, 3), 261), np.ones((1, 3), np.int64))


def test_what_two_graphs_cannot_do_is_said(
    bundle: Path, base: Path, adapter: Path, loaded: LoadedBundle, tmp_path: Path
) -> None:
    for options in (
        ExportOptions(adapters="runtime", merge=False),
        ExportOptions(merge=False, prefix_slots=True),
    ):
        given = adapter if options.keeps_adapters else None
        with pytest.raises(ConfigError, match="two graphs"):
            peft_deploy.export(base, tmp_path / "out", adapter=given, options=options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(BundleError, match="two graphs"):
        Session(bundle)
    with pytest.raises(AdapterError, match="take no prefix"):
        loaded.generate("a", prefix="some")
    with pytest.raises(ConfigError, match="two"):
        validate(bundle, base, adapter=adapter, bisect=tmp_path / "fault")
    result = CliRunner().invoke(cli, ["bench", str(bundle)])
    assert result.exit_code == 2 and "two graphs" in result.output


def test_paddles_format_runs_both_programs(base: Path, adapter: Path, tmp_path: Path) -> None:
    options = ExportOptions(format="paddle")
    result = peft_deploy.export(base, tmp_path / "out", adapter=adapter, options=options)
    assert result.parity is not None and result.parity.passed
    assert (tmp_path / "out/encoder/model.pdiparams").is_file()
    assert inspect_bundle(tmp_path / "out", verify=True).problems == ()
    loaded = load_bundle(tmp_path / "out")
    source = loaded.tokenizer.encode(SOURCES[0])
    answer = loaded.generate(SOURCES[0], max_new_tokens=5).token_ids
    assert list(answer) == greedy(base, adapter, source, 5)
