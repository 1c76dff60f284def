"""Prompts of RecIF-Bench for language models, and the judges of what they write."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from sagerec.cli import main
from sagerec.errors import ArtifactError
from sagerec.files import read_record
from sagerec.recif.judges import BertScore, Endpoint, greedy_f1, read_score
from sagerec.recif.prompts import BEAMS, THOUGHT, Decoding, chat_prompt, unconstrained
from tests.recif_files import A, B, row, write_lines, write_task

MESSAGES = [{"role": "system", "content": "助手"}, {"role": "user", "content": "问"}]
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def test_prompts_with_and_without_thought() -> None:
    begin = "<|im_start|>system\n助手<|im_end|>\n<|im_start|>user\n问"
    assert chat_prompt(MESSAGES, False) == (
        f"{begin}/no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert chat_prompt(MESSAGES, True) == f"{begin}/think<|im_end|>\n<|im_start|>assistant\n"
    only = chat_prompt([*MESSAGES, {"role": "assistant", "content": "答"}, MESSAGES[1]], True)
    assert only.count("/think") == 1  # on the last user message
    assert only.endswith("问/think<|im_end|>\n<|im_start|>assistant\n")


def test_unconstrained_decoding_is_the_published_one() -> None:
    """Beams of 3 tokens behind the begin tag; with thought, the thought is sampled first and closed."""
    asked: list[tuple[list[str], Decoding]] = []

    def generate(prompts: list[str], decoding: Decoding) -> list[list[str]]:
        asked.append((prompts, decoding))
        return [["想"] if decoding is THOUGHT else [A, B] for _ in prompts]

    assert unconstrained([MESSAGES], generate) == [[f"<|sid_begin|>{A}", f"<|sid_begin|>{B}"]]
    assert asked == [([chat_prompt(MESSAGES, False) + "<|sid_begin|>"], BEAMS)]
    asked.clear()
    opening = "想</think>\n<|sid_begin|>"
    assert unconstrained([MESSAGES], generate, think=True) == [[opening + A, opening + B]]
    prompt = chat_prompt(MESSAGES, True)
    assert asked == [([prompt], THOUGHT), ([prompt + opening], BEAMS)]
    assert (BEAMS.beams, BEAMS.new_tokens, THOUGHT.beams, THOUGHT.stop) == (32, 3, None, "</think>")


def test_greedy_f1_by_hand() -> None:
    """Text tokens e1, e2, reference e1: best cosines 1, 0 and 1; P = .5, R = 1, F1 = 2/3."""
    e = torch.eye(3)
    assert greedy_f1(e[:2], 5 * e[:1]) == pytest.approx(2 / 3)
    assert greedy_f1(e[:2], e[:2]) == pytest.approx(1.0)
    assert greedy_f1(e[:1], e[1:2]) == 0.0


@needs_transformers
def test_bertscore_of_a_local_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny encoder with random weights: the same text scores 1, no text 0, another one less than 1."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "一", "个", "女", "孩", "男"]
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    name, values = BertScore(folder).judge(
        "item_understand", [("想</think>一个女孩", "一个女孩"), ("", "一个女孩"), ("一个男孩", "一个女孩")]
    )
    assert name == "bertscore_f1"
    assert values[0] == pytest.approx(1.0, abs=1e-5)
    assert values[1] == 0.0
    assert 0 < values[2] < 1
    benchmark = tmp_path / "b"
    write_task(benchmark, "item_understand", [row("一个女孩", pid=1), row("一个女孩", pid=2)])
    path = write_lines(tmp_path / "p.jsonl", [{"task": "item_understand", "row": 1, "predictions": ["一个女孩"]}])
    words = ["recif", "evaluate", "--benchmark", str(benchmark), "--predictions", str(path), "--out", str(tmp_path)]
    assert main([*words, "--judge-folder", str(folder)]) == 0
    found = read_record(tmp_path / "recif.json")["tasks"]["item_understand"]
    assert found["metrics"]["bertscore_f1"] == pytest.approx(0.5, abs=1e-5)
    assert found["judge"] == "BERTScore by encoder, layer 9"
    with pytest.raises(ArtifactError, match="cannot be read as a Hugging Face encoder"):
        BertScore(tmp_path / "b").judge("rec_reason", [("a", "b")])
    capsys.readouterr()


class _Answering(BaseHTTPRequestHandler):
    """Gives what `said` holds, and keeps what it was asked."""

    said: ClassVar[str] = ""
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.asked.append(
            {"path": self.path, "key": self.headers["Authorization"]} | json.loads(self.rfile.read(length))
        )
        body = json.dumps({"choices": [{"message": {"content": self.said}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of an endpoint in this process."""
    server = HTTPServer(("127.0.0.1", 0), _Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Answering.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_behind_an_endpoint(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEREC_JUDGE_KEY", "secret")
    _Answering.said = '<think>5?</think>```json\n{"score": 4}\n```'
    judge = Endpoint(server, "a-model")
    pairs = [("想</think>因为喜欢", "因为喜欢"), ("  ", "因为喜欢")]
    assert judge.judge("rec_reason", pairs) == ("judge_score", [4.0, 0.0])
    (asked,) = _Answering.asked
    assert asked["path"] == "/v1/chat/completions"
    assert asked["key"] == "Bearer secret"
    assert asked["model"] == "a-model"
    assert "因为喜欢" in asked["messages"][0]["content"]
    assert "想" not in asked["messages"][0]["content"]
    _Answering.said = "I cannot"
    with pytest.raises(ArtifactError, match="said 'I cannot'; expected"):
        judge.judge("rec_reason", pairs)


def test_a_judge_that_is_not_there() -> None:
    with pytest.raises(ArtifactError, match="does not answer"):
        Endpoint("http://127.0.0.1:9/v1", "m").judge("rec_reason", [("a", "b")])
    with pytest.raises(ArtifactError, match="expected http"):
        Endpoint("file:///etc", "m").judge("rec_reason", [("a", "b")])
    assert read_score('{"score": 3}', "x") == 3.0
    with pytest.raises(ArtifactError, match="score"):
        read_score('{"score": 7}', "x")
