"""lm-eval over checkpoints: its own `hf` model on what is exported of them finds the same."""

import itertools
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.jobs.test_export import MODELS, trained

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from jobs.evaluation.lm import CheckpointLM
from jobs.evaluation.texts import Texts
from jobs.export import export
from jobs.screen import Screen
from jobs.tokenizer import END, train_tokenizer
from jobs.trained import open_trained
from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.data.config import DataConfig
from workers.data.json_tokenizer import write_tokenizer
from workers.data.tokenizer import BYTES
from workers.data.tokenizer_files import open_tokenizer
from workers.models import build, logits_of
from workers.scoring import score

SEQ_LEN = 48
BEGIN = "<|begin|>"
LONG = "".join(f"def f{number}(x):\n    return x * {number}\n\n" for number in range(40))
PAIRS = [
    ("import os\nimport ", "sys\n"),
    ("import os\nimport ", "re\n"),
    ("x = [1, 2", "]"),
    ("x = [1, 2", ")"),
    ("x = [1, 2", ","),
    ("", "def naïve(x):\n"),
    ("", "\x00begins with the end"),
    ("", "x"),
    ("\n", "class"),
    ("   ", "indented"),
    (LONG, "return x"),
    ("short", LONG[:40]),
    (LONG[:100], LONG[100:140]),
    (f"{BEGIN}import ", "os"),
    ("a\x00b", "c\x00"),
    (f"text {END} more", f" {END}"),
    ("日本", "語は\u2603"),
]
TEXTS = ["", "x", "def f():\n    pass\n", LONG, LONG[:SEQ_LEN], LONG[: SEQ_LEN + 1], f"{BEGIN}日本\x00 {END}"]


def requests(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, one, 0, (kind, number, 1)) for number, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Bytes, a real BPE, and the same with a template that begins each text."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing

    root = tmp_path_factory.mktemp("tokenizers")
    (root / "text.py").write_text(LONG + (open(itertools.__spec__.origin).read() if 0 else open(os.__file__).read()))
    train_tokenizer(str(root / "text.py"), 400, str(root / "bpe"), "text", 0, Screen(quiet=True))
    begun = Tokenizer.from_file(str(root / "bpe" / "tokenizer.json"))
    begun.add_special_tokens([AddedToken(BEGIN, special=True, normalized=False)])
    special = [(BEGIN, begun.token_to_id(BEGIN))]
    begun.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=special)
    (root / "begun").mkdir()
    begun.save(str(root / "begun" / "tokenizer.json"))
    found = {name: open_tokenizer(DataConfig(tokenizer=str(root / name))) for name in ("bpe", "begun")}
    assert found["begun"].begin is not None and found["bpe"].begin is None
    return {"bytes": BYTES, **found}


@pytest.fixture(scope="module", params=["moonlight-bytes", "llama-bytes", "moonlight-begun", "llama-bpe"])
def both(request, tmp_path_factory, tokenizers):
    """Our model over a checkpoint, and lm-eval's own over the export."""
    name, _, kind = request.param.partition("-")
    root, tokenizer = tmp_path_factory.mktemp(request.param), tokenizers[kind]
    known = {"data.tokenizer": tokenizer.sha256, "train.seq_len": SEQ_LEN}
    config = replace(MODELS[name], vocab_size=max(256, tokenizer.vocab_size + 3))
    trained(root / "run", config, **known)
    write_tokenizer(Store(str(root / "run")), tokenizer)
    export(str(root / "run"), str(root / "hf"), "float32")
    opened = open_trained(str(root / "run"), "")
    ours = CheckpointLM(opened.model(), opened.tokenizer, opened.seq_len, batch_tokens=200)
    return ours, HFLM(str(root / "hf"), device="cpu", dtype="float32", batch_size=1)


def test_ids_are_those_of_transformers(both):
    ours, theirs = both
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    assert ours.max_length == theirs.max_length == SEQ_LEN
    for text in {*TEXTS, *itertools.chain(*PAIRS)}:
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


def close(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(their, abs=1e-4)


def test_likelihoods_are_those_of_lm_evals_own_model(both):
    ours, theirs = both
    asked = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # With blanks alone theirs raises.
    found, expected = (model.loglikelihood(requests("loglikelihood", asked)) for model in both)
    close([value for value, _ in found], [value for value, _ in expected])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_is_told(both):
    ours, theirs = both
    (written,) = theirs.generate_until(requests("generate_until", [("import os\n", {"until": [], "max_gen_toks": 6})]))
    asked = [("import os\n", written), ("import os\n", written[:-1] + "~")]
    for model in both:
        print(written, model.loglikelihood(requests("loglikelihood", asked)))


def test_rolling_likelihoods_are_those_of_lm_evals_own_model(both):
    found, expected = (model.loglikelihood_rolling(requests("rolling", [(text,) for text in TEXTS])) for model in both)
    for mine, their in zip(found, expected, strict=True):
        assert mine == pytest.approx(their, abs=1e-4, rel=1e-6)
    assert found[0] == 0 and found[3] < -1000


def test_generated_texts_are_those_of_lm_evals_own_model(both):
    asks = [
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 30},
        {"until": ["e", "x"], "max_new_tokens": 20},
    ]
    asked = [(text, ask) for text in ("import os\n", LONG, "x", "日本") for ask in asks]
    found, expected = (model.generate_until(requests("generate_until", asked)) for model in both)
    assert found == expected and len(set(found)) > 4, found
