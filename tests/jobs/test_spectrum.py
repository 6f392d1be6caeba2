"""The spectra of checkpoints without Ray: which matrices, what is read of them, how they are compared and drawn."""

import csv
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jobs.export import export
from jobs.study.spectra import Measured, Subject, common_stacks, groups_of, label_all, split_of
from jobs.study.spectrum import PICTURES, Request, compared
from jobs.study.spectrum import spectrum as study
from jobs.study.spectrum_files import MATRICES_CSV, VALUES_CSV, write_tables
from jobs.trained import open_trained, series
from orchestrator.log.run_log import RunLog
from orchestrator.stop import StopSignal
from orchestrator.tasks import _patiently
from tests.jobs.test_export import MODELS, trained
from workers import spectra
from workers.common.errors import ConfigError, DamagedError, Interrupted, StorageError
from workers.common.storage import Store
from workers.models.language_model import MATRICES
from workers.spectra import Saved, spectra_of, stacks_of

NOWHERE = "sqlite:///nowhere.db"


def opened(folder, step: int = 10):
    return open_trained(f"{folder}@{step}", NOWHERE)


def measured(one, split: str = "none", groups=MATRICES) -> Measured:
    """Measure a checkpoint piece by piece, in this process."""
    store = one.reader.store
    saved = [Saved(store.url, store.s3_endpoint, one.commit.manifest, one.commit.sha256)]
    pieces = [piece for stack in stacks_of(one.model_config, groups, split) for piece in stack.pieces()]
    found = tuple(spectrum for piece in pieces for spectrum in spectra_of(saved, (0, piece)))
    return Measured(one.run_id, one.step, one.manifest.counters["tokens"], found)


def of_export(folder, spectrum) -> np.ndarray:
    """Return the matrix of a spectrum out of an exported model, by Hugging Face's name."""
    name = spectrum.name
    if spectrum.expert is not None:
        name = re.sub(r"\.experts\.(\w+)$", rf".experts.{spectrum.expert}.\1.weight", name)
    return load_file(folder / "model.safetensors")[name].astype(np.float64)


def entropy_of(values: np.ndarray) -> float:
    shares = values**2 / np.sum(values**2)
    return float(-np.sum(shares[shares > 0] * np.log(shares[shares > 0])) / math.log(len(values)))


@pytest.mark.numeric
@pytest.mark.parametrize("piece", [1, 3000, 1 << 24])
@pytest.mark.parametrize("name", MODELS)
def test_every_spectrum_is_that_of_the_exported_matrix(tmp_path, monkeypatch, name, piece):
    """Whatever the size of the pieces: one matrix each, some of a stack, all."""
    monkeypatch.setattr(spectra, "PIECE", piece)
    model = trained(tmp_path / "run", name)
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    found = measured(opened(tmp_path / "run"))
    kinds = model.parameter_kinds()
    expected = sum(
        parameter.numel() // math.prod(parameter.shape[-2:])
        for key, parameter in model.named_parameters()
        if kinds[key] in MATRICES
    )
    assert len(found.spectra) == len({(one.name, one.expert) for one in found.spectra}) == expected
    for one in found.spectra:
        matrix = of_export(tmp_path / "hf", one)
        values = np.linalg.svd(matrix, compute_uv=False)
        assert (one.rows, one.columns) == matrix.shape and one.kind == kinds[one.name]
        assert f"layers.{one.layer}." in one.name
        assert np.abs(one.values - values).max() < 1e-7 * values[0]
        assert one.entropy == pytest.approx(entropy_of(values), abs=1e-10)
        assert (one.largest, one.smallest) == (one.values[0], one.values[-1])
    for group, mean in found.means.items():
        entropies = [one.entropy for one in found.spectra if one.kind == group]
        assert mean.entropy == pytest.approx(sum(entropies) / len(entropies)) and mean.matrices == len(entropies)
        of_layers = [mean for (kind, _), mean in found.by_layer.items() if kind == group]
        assert sum(layer.entropy * layer.matrices for layer in of_layers) == pytest.approx(sum(entropies))


@pytest.mark.numeric
@pytest.mark.parametrize("split", ["fused", "heads"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_are_the_rows_that_the_optimizer_takes_apart(tmp_path, name, split):
    model = trained(tmp_path / "run", name)
    found = measured(opened(tmp_path / "run"), split, ("attention_qo", "attention_kv")).spectra
    weights, parts = dict(model.named_parameters()), model.matrix_parts(split)
    assert {one.name for one in found if one.part is not None} == parts.keys()
    for key, rows in parts.items():
        ours = sorted((one for one in found if one.name == key), key=lambda one: one.part)
        for one, matrix in zip(ours, weights[key].detach().double().split(rows), strict=True):
            assert one.values == pytest.approx(torch.linalg.svdvals(matrix).numpy(), abs=1e-6)


def test_a_matrix_that_is_not_finite_is_left_out_and_told(tmp_path):
    def spoil(model) -> None:
        weights = dict(model.named_parameters())
        weights["model.layers.1.mlp.experts.up_proj"].data[2, 1, 1] = math.nan

    trained(tmp_path / "run", "moonlight", change=spoil)
    found = measured(opened(tmp_path / "run"))
    (left,) = [one for one in found.spectra if one.entropy is None]
    assert (left.name, left.expert) == ("model.layers.1.mlp.experts.up_proj", 2)
    mean = found.means["experts"]
    assert mean.left_out == 1 and mean.entropy is not None
    assert compared(found, found, "experts") == (0.0, 0, mean.matrices)
    write_tables(tmp_path, [[found]])
    PICTURES["singular_values.png"](tmp_path / "picture.png", [[found]])


def test_the_tables_hold_every_number(tmp_path):
    trained(tmp_path / "run", "moonlight", steps=(10, 20))
    first, last = (measured(one) for one in series(str(tmp_path / "run"), NOWHERE))
    without = replace(first, spectra=tuple(replace(one, values=None) for one in first.spectra))
    write_tables(tmp_path, [[without, last]])
    with (tmp_path / MATRICES_CSV).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10"] * len(first.spectra) + ["20"] * len(last.spectra)
    for row, spectrum in zip(rows, (*first.spectra, *last.spectra), strict=True):
        assert (row["parameter"], row["group"]) == (spectrum.name, spectrum.kind)
        assert row["expert"] == ("" if spectrum.expert is None else str(spectrum.expert))
        for key in ("entropy", "largest", "median", "smallest"):
            assert float(row[key]) == getattr(spectrum, key)
    with (tmp_path / VALUES_CSV).open() as file:
        rows = list(csv.DictReader(file))
    for row, spectrum in zip(rows, last.spectra, strict=True):
        values = [float(value) for value in row["singular_values"].split()]
        assert row["step"] == "20" and values == pytest.approx(spectrum.values.tolist(), rel=1e-8)


def test_pictures_are_of_any_number_of_groups_and_checkpoints(tmp_path):
    trained(tmp_path / "a", "moonlight", steps=(10, 20))
    a = [measured(one) for one in series(str(tmp_path / "a"), NOWHERE)]
    b = [measured(opened(tmp_path / "a"), groups=("router",))]
    for number, found in enumerate(([a, a], [b])):
        for name, draw in PICTURES.items():
            draw(tmp_path / f"{number}-{name}", found)
            assert (tmp_path / f"{number}-{name}").read_bytes().startswith(b"\x89PNG")


def test_models_whose_matrices_differ_are_refused_with_what_differs(tmp_path):
    small = MODELS["moonlight"]
    trained(tmp_path / "a", small, run_id="a")
    trained(tmp_path / "b", replace(small, num_experts=small.num_experts + 2), run_id="b")
    trained(tmp_path / "c", "llama", run_id="c")
    a, b, c = (Subject(name, (opened(tmp_path / name),)) for name in "abc")
    with pytest.raises(ConfigError, match=r"a and b have other matrices.*gate\.weight is 1x6x.* and 1x8x.*--group"):
        common_stacks([a, b], MATRICES, "none")
    assert common_stacks([a, b], ["attention_qo"], "none"), "of another number of experts, but the same attention"
    with pytest.raises(ConfigError, match="not there.*and [0-9]+ more"):
        common_stacks([a, c], MATRICES, "none")
    with pytest.raises(ConfigError, match="c: this model has no matrices of the group router"):
        common_stacks([c], ["dense", "router"], "none")
    assert {stack.kind for stack in common_stacks([c], MATRICES, "none")} == {"attention_qo", "attention_kv", "dense"}


def test_labels_tell_one_from_the_other(tmp_path):
    for name in ("11111111aa", "22222222bb"):
        trained(tmp_path / name, "llama", steps=(10, 20), run_id=name)
    a10, a20 = series(str(tmp_path / "11111111aa"), NOWHERE)
    b10, _ = series(str(tmp_path / "22222222bb"), NOWHERE)

    def named(one, name: str):
        return replace(one, found=replace(one.found, name=name))

    def labels(*found) -> list[str]:
        return [subject.label for subject in label_all([[one] for one in found])]

    assert labels(a10, b10) == ["11111111", "22222222"]
    assert labels(a10, a20) == ["11111111@10", "11111111@20"]
    assert labels(named(a10, "demo"), named(b10, "demo")) == ["demo (11111111)", "demo (22222222)"]
    assert labels(named(a10, "demo"), named(a20, "demo"), named(b10, "demo")) == [
        "demo (11111111)@10",
        "demo (11111111)@20",
        "demo (22222222)@10",
    ]
    with pytest.raises(ConfigError, match="11111111aa@10 is named twice"):
        labels(a10, a20, a10)


def test_what_is_asked_for_is_there():
    assert groups_of([]) == MATRICES and groups_of(["router", "dense"]) == ("router", "dense")
    with pytest.raises(ConfigError, match="--group norms: no such group of matrices; there are attention_qo, "):
        groups_of(["router", "norms"])
    with pytest.raises(ConfigError, match="--split must be none, fused or heads, not 'half'"):
        split_of("half")


def test_a_damaged_shard_is_told(tmp_path):
    trained(tmp_path / "run", "llama")
    (shard,) = (tmp_path / "run").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match="damaged"):
        measured(opened(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"log": True}, "--log: .*run@20 is of no run in MLflow"),
        ({"what": ("run/@11",)}, "no committed checkpoint of step 11; there are checkpoints of step 10, 20"),
        ({"what": ("run/@10",), "series": True}, "name it without @10"),
        ({"what": ("run/", "run/")}, "is named twice"),
        ({"what": ("empty/",)}, "no committed checkpoint; see: raymuon checkpoints ls"),
        ({"out": "run"}, "something is there already; name a new folder"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch, changes, told):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "run", "llama", steps=(10, 20))
    RunLog(Store(str(tmp_path / "empty"))).take_over({})
    before = sorted(tmp_path.rglob("*"))
    request = replace(Request(("run/",), False, (), "none", "", False, None, NOWHERE, ""), **changes)
    with pytest.raises(ConfigError, match=told):
        study(request, StopSignal(lambda run_id: ""), as_json=False)
    assert sorted(tmp_path.rglob("*")) == before


ENDS = [("measure", Interrupted), ("draw", StorageError), ("draw", KeyboardInterrupt)]


@pytest.mark.parametrize(("step", "error"), ENDS)
def test_what_does_not_come_to_its_end_leaves_nothing(tmp_path, monkeypatch, step, error):
    def fail(path=None, *given) -> None:
        if step == "draw":
            path.write_bytes(b"half")
        raise OSError("full") if error is StorageError else error()

    trained(tmp_path / "run", "llama")
    found = [[measured(opened(tmp_path / "run"))]]
    monkeypatch.setattr("jobs.study.spectrum.measure", fail if step == "measure" else lambda *given: found)
    monkeypatch.setitem(PICTURES, "entropy.png", fail)
    request = Request((f"{tmp_path}/run",), False, (), "none", f"{tmp_path}/out", False, None, NOWHERE, "")
    with pytest.raises(error):
        study(request, StopSignal(lambda run_id: ""), as_json=False)
    assert not (tmp_path / "out").exists()


def test_what_was_found_is_told_where_mlflow_does_not_take_it(tmp_path, monkeypatch, capsys):
    """Of all checkpoints of a series those are named in which something is not finite."""

    def fail(*given) -> None:
        raise StorageError("gone")

    def spoil(model) -> None:
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.inf

    trained(tmp_path / "run", "llama", change=spoil)
    first = measured(opened(tmp_path / "run"))
    whole = tuple(replace(one, entropy=0.5, values=np.ones(2)) for one in first.spectra)
    monkeypatch.setattr("jobs.study.spectrum.measure", lambda *given: [[first, replace(first, step=20, spectra=whole)]])
    monkeypatch.setattr("jobs.study.spectrum._tracked", lambda subjects: [opened(tmp_path / "run")])
    monkeypatch.setattr("jobs.study.spectrum._write", lambda *given: None)
    monkeypatch.setattr("jobs.study.spectrum._log", fail)
    request = Request((f"{tmp_path}/run",), True, (), "none", f"{tmp_path}/out", True, None, NOWHERE, "")
    with pytest.raises(StorageError, match="gone"):
        study(request, StopSignal(lambda run_id: ""), as_json=False)
    told = capsys.readouterr().out
    assert "0.5000" in told and f"{tmp_path}/out/layers.png" in told.replace("\n", "") and "in MLflow" not in told
    assert "10: 1 matrices are not finite and left out" in told


def test_a_task_does_not_try_again_what_is_damaged():
    tries = []

    def fail(shared: str, item: int) -> None:
        tries.append((shared, item))
        raise DamagedError("damaged")

    with pytest.raises(DamagedError):
        _patiently(fail, "shared", 3)
    assert tries == [("shared", 3)]
