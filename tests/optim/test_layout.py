"""Layout and plan are pure: hypothesis looks for shapes that break them."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from optim.assignment import Batch, Matrix, matrices_of, plan_orthogonalization
from optim.layout import Fragment, GroupLayout, copies, partition_size

numels = st.lists(st.integers(1, 60), min_size=1, max_size=12)
worlds = st.integers(1, 9)


def layout_of(sizes: list[int], world_size: int) -> GroupLayout:
    return GroupLayout.of([f"p{i}" for i in range(len(sizes))], sizes, world_size)


@given(numels, worlds)
def test_fragments_tile_every_parameter_exactly_once(sizes, world_size):
    layout = layout_of(sizes, world_size)
    assert layout.partition == partition_size(sum(sizes), world_size)
    seen = {name: [] for name in layout.names}
    for rank in range(world_size):
        fragments = layout.fragments(rank)
        assert sum(f.length for f in fragments) <= layout.partition
        for fragment in fragments:
            seen[fragment.name] += range(fragment.start, fragment.stop)
            flat = layout.starts[layout.names.index(fragment.name)] + fragment.start
            assert flat == rank * layout.partition + fragment.offset
    assert {name: list(range(size)) for name, size in zip(layout.names, sizes, strict=True)} == seen


@given(numels, worlds, worlds)
def test_any_world_size_can_be_filled_from_any_other(sizes, before, after):
    old, new = layout_of(sizes, before), layout_of(sizes, after)
    content = {name: [(name, i) for i in range(size)] for name, size in zip(old.names, sizes, strict=True)}
    buffers, have = [], []
    for rank in range(before):
        buffer = [None] * old.partition
        for f in old.fragments(rank):
            buffer[f.offset : f.offset + f.length] = content[f.name][f.start : f.stop]
            have.append((rank, f))
        buffers.append(buffer)
    for rank in range(after):
        want = new.fragments(rank)
        target = [None] * new.partition
        plan, missing = copies(have, want)
        assert missing == []
        assert {*new.sharing(rank, old)} == {copy.source for copy in plan}, "no rank too many, none too few"
        for copy in plan:
            piece = buffers[copy.source][copy.source_offset : copy.source_offset + copy.length]
            target[copy.target_offset : copy.target_offset + copy.length] = piece
        for f in want:
            assert target[f.offset : f.offset + f.length] == content[f.name][f.start : f.stop]


@given(numels, worlds, worlds, st.sets(st.integers(0, 8)))
def test_what_lost_ranks_had_is_missing_and_nothing_else(sizes, before, after, lost):
    old, new = layout_of(sizes, before), layout_of(sizes, after)
    have = [(rank, f) for rank in set(range(before)) - lost for f in old.fragments(rank)]
    lost &= set(range(before))
    gone = {(f.name, i) for rank in lost for f in old.fragments(rank) for i in range(f.start, f.stop)}
    for rank in range(after):
        want = new.fragments(rank)
        place = {f.offset + i: (f.name, f.start + i) for f in want for i in range(f.length)}
        plan, missing = copies(have, want)
        copied = [at for copy in plan for at in range(copy.target_offset, copy.target_offset + copy.length)]
        lacking = {f.offset + i: (f.name, f.start + i) for f in missing for i in range(f.length)}
        assert sorted([*copied, *lacking]) == sorted(place)
        assert lacking == {at: element for at, element in place.items() if element in gone}


def test_a_hole_is_named():
    _, missing = copies([(0, Fragment("w", 0, 4, 0)), (1, Fragment("w", 5, 1, 0))], [Fragment("w", 0, 7, 10)])
    assert missing == [Fragment("w", 4, 1, 14), Fragment("w", 6, 1, 16)]
    assert str(missing[0]) == "w[4:5]"


shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8)


@given(shapes, worlds)
def test_every_matrix_is_orthogonalized_once_and_pieces_tile_the_straddlers(group, world_size):
    layout = layout_of([e * a * b for e, a, b in group], world_size)
    matrices = matrices_of(layout, [[(a, b)] * e for e, a, b in group])
    plan = plan_orthogonalization(layout, matrices)
    done = [shape for rank in range(world_size) for shape in plan.matrices(rank)]
    assert sorted(done) == sorted((matrix.rows, matrix.columns) for matrix in matrices)
    whole = [
        Matrix(rank * layout.partition + batch.offset + number * batch.stride, batch.rows, batch.columns)
        for rank, batches in enumerate(plan.local)
        for batch in batches
        for number in range(batch.count)
    ]
    assert set(whole) <= set(matrices), "each where it lies"
    assert len(whole) == len(set(whole)) == len(matrices) - len(plan.straddlers)
    assert len(plan.straddlers) <= world_size - 1
    for straddler in plan.straddlers:
        assert straddler.owner in {piece.holder for piece in straddler.pieces}
        positions = [i for p in straddler.pieces for i in range(p.position, p.position + p.length)]
        assert positions == list(range(straddler.rows * straddler.columns))
    travelling = sum(p.length for r in range(world_size) for q in range(world_size) for p in plan.sent(r, q))
    assert travelling == sum(p.length for m in plan.straddlers for p in m.pieces if p.holder != m.owner)
    assert sum(plan.elements_sent()) == 2 * travelling, "there and back"


def test_the_experts_of_a_stack_are_one_batch_and_so_are_equal_layers():
    group = [(8, 4, 6), (1, 5, 5), (8, 4, 6), (1, 5, 5), (8, 4, 6)]
    layout = layout_of([e * a * b for e, a, b in group], 1)
    plan = plan_orthogonalization(layout, matrices_of(layout, [[(a, b)] * e for e, a, b in group]))
    assert plan.local == (
        (
            Batch(0, 24, 8, 4, 6),
            Batch(217, 24, 8, 4, 6),
            Batch(434, 24, 8, 4, 6),
            Batch(192, 217, 2, 5, 5),
        ),
    )


def test_a_tie_goes_to_whoever_has_less_to_do():
    layout = GroupLayout.of(["a", "b", "c"], [26, 20, 26], 2)
    matrices = [Matrix(0, 2, 13), Matrix(26, 4, 5), Matrix(46, 13, 2)]
    assert layout.partition == 36
    assert plan_orthogonalization(layout, matrices).straddlers[0].owner == 0, "the lower rank"
    heavy = plan_orthogonalization(layout, matrices, lambda rows, columns: 100 if rows == 2 else 1)
    assert heavy.straddlers[0].owner == 1


def test_layout_and_plan_import_nothing_heavy():
    code = "import sys, optim.layout, optim.assignment, optim.polynomials; "
    code += "print({'torch', 'numpy', 'ray', 'deepspeed'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
