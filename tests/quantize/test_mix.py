"""Which tensor gets which type: the knapsack against trying all, the ladder, sizes that are kept, and bad requests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.convert import Job, prepare
from ernie_gguf.errors import QuantizeError
from ernie_gguf.expected import Role
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.types import GgmlType
from ernie_gguf.quantize.mix import (
    EXPERT_LOSS,
    Group,
    Option,
    ccq2_losses,
    expert_of,
    frontier,
    groups_of,
    parse_override,
)
from ernie_gguf.quantize.target import MixRequest, choose_mix, mix_json, parse_target, read_losses
from released import bf16_21b, write_sparse
from support.checkpoints import make

from quantize.small import SMALL


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The 21B at its full shapes, headers over holes."""
    source = write_sparse(tmp_path_factory.mktemp("21B") / "ERNIE-4.5-21B-A3B-PT", bf16_21b())
    return prepare(source, Outtype.CCQ2)


@pytest.fixture(scope="module")
def small_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return prepare(make(tmp_path_factory.mktemp("small") / "small", SMALL), Outtype.CCQ2)


def types_of(job: Job, request: MixRequest) -> dict[str, GgmlType]:
    mix = choose_mix(job, request, {})
    return {t.name: t.ggml_type for t in mix.job.plan.tensors if t.expected.role is not Role.EXACT}


def test_the_knapsack_against_trying_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        groups = [
            Group((), tuple(Option(GgmlType.IQ2_S, int(n), float(loss)) for n, loss in rng.uniform(1, 100, (3, 2))))
            for _ in range(4)
        ]
        most = 200
        found = frontier(groups, most)
        assert found.unit == 1
        for budget in range(40, most, 13):
            fitting = [
                sum(option.loss for option in each)
                for each in itertools.product(*(group.options for group in groups))
                if sum(option.nbytes for option in each) <= budget
            ]
            assert found.loss[budget] == pytest.approx(min(fitting, default=np.inf))


@pytest.mark.parametrize("target", ["6.6G", "7G", "8G", "9.3G", "12G", "15G", "20G"])
@pytest.mark.parametrize("stock", [False, True])
def test_a_target_is_met_within_half_a_percent_and_never_exceeded(job: Job, target: str, stock: bool) -> None:
    wanted = parse_target(target)
    mix = choose_mix(job, MixRequest(target=wanted, stock=stock), {})
    assert 0.995 * wanted <= mix.nbytes <= wanted
    if stock:
        assert all(tensor.ggml_type is not GgmlType.CCQ2 for tensor in mix.job.plan.tensors)


@pytest.mark.parametrize("bits", [2.2, 2.3, 2.5, 2.7, 3.0, 3.5, 4.2, 5.0])
def test_bits_are_those_of_the_experts(job: Job, bits: float) -> None:
    mix = choose_mix(job, MixRequest(bits=bits), {})
    assert 0.98 * bits <= mix.bits <= bits
    rest = {t.ggml_type for t in mix.job.plan.tensors if t.expected.role is Role.LINEAR}
    assert rest == {GgmlType.Q8_0}


def test_more_bytes_never_lose_more(job: Job) -> None:
    losses = [choose_mix(job, MixRequest(bits=bits), {}).loss for bits in np.arange(2.1, 5.5, 0.2)]
    assert all(a is not None and b is not None and b <= a for a, b in itertools.pairwise(losses))


def test_down_climbs_first(job: Job) -> None:
    types = types_of(job, MixRequest(bits=2.30))
    by_projection = {p: {types[n] for n in types if f"ffn_{p}_exps" in n} for p in ("gate", "up", "down")}
    assert by_projection["gate"] == by_projection["up"]
    least = {p: min(EXPERT_LOSS[t] for t in found) for p, found in by_projection.items()}
    assert least["down"] < least["gate"]


def test_gate_and_up_of_a_layer_go_together(job: Job) -> None:
    for bits in (2.4, 2.9, 3.7):
        types = types_of(job, MixRequest(bits=bits))
        for name, ggml_type in types.items():
            if "ffn_gate_exps" in name:
                assert types[name.replace("gate", "up")] is ggml_type


def test_the_rest_is_q6_k_in_small_files_and_q8_0_in_large_ones(job: Job) -> None:
    small, large = (types_of(job, MixRequest(target=parse_target(size))) for size in ("6.8G", "16G"))
    assert small["blk.5.attn_q.weight"] is GgmlType.Q6_K
    assert large["blk.5.attn_q.weight"] is GgmlType.Q8_0


def test_stock_without_a_size_is_iq2_s(job: Job) -> None:
    mix = choose_mix(job, MixRequest(stock=True), {})
    assert {t.ggml_type for t in mix.job.plan.tensors if t.is_expert} == {GgmlType.IQ2_S}
    assert mix.job.plan.label == "IQ2_S"


def test_overrides_win_and_the_first_counts(job: Job) -> None:
    overrides = tuple(map(parse_override, (r"blk\.3\.ffn_down_exps=iq4_xs", "ffn_down=Q3_K", "attn_v=q6_k")))
    mix = choose_mix(job, MixRequest(bits=2.8, overrides=overrides), {})
    types = {t.name: t.ggml_type for t in mix.job.plan.tensors}
    assert types["blk.3.ffn_down_exps.weight"] is GgmlType.IQ4_XS
    assert types["blk.4.ffn_down_exps.weight"] is GgmlType.Q3_K
    assert types["blk.4.attn_v.weight"] is GgmlType.Q6_K
    assert types["blk.4.ffn_gate_inp.weight"] is GgmlType.F32
    assert mix.bits <= 2.8


def test_measured_losses_move_bits_to_the_hard_layers(job: Job, tmp_path: Path) -> None:
    hard = 20
    tensors = [
        {"name": name, "type": "ccq2", "metric_error": 0.05 * (8 if expert_of(name)[0] == hard else 1)}
        for name in ccq2_losses(job.plan)
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"tensors": tensors}))
    losses = read_losses(tmp_path, job.plan)
    assert sum(losses.values()) == pytest.approx(sum(ccq2_losses(job.plan).values()))
    types = types_of(job, MixRequest(bits=2.3, losses=losses))
    worst = [EXPERT_LOSS[types[f"blk.{layer}.ffn_gate_exps.weight"]] for layer in (hard, 5)]
    assert worst[0] < worst[1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "not a report.json"),
        ('{"tensors": []}', "has no error of blk.1.ffn_gate_exps.weight"),
        ("not json", "not a report.json"),
        (None, "No such file"),
    ],
)
def test_a_bad_report(small_job: Job, tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(QuantizeError, match=problem):
        read_losses(path, small_job.plan)


def test_too_small_says_what_is_possible(job: Job) -> None:
    with pytest.raises(
        QuantizeError, match=r"--target-size 4.0 GB is too small: the smallest possible file has (.*) GB"
    ):
        choose_mix(job, MixRequest(target=parse_target("4G")), {})
    with pytest.raises(QuantizeError, match=r"--bits 1.5 is too small: the smallest possible are 2\.06"):
        choose_mix(job, MixRequest(bits=1.5), {})


def test_what_it_says_is_possible_is_possible(job: Job) -> None:
    with pytest.raises(QuantizeError) as caught:
        choose_mix(job, MixRequest(target=parse_target("4G")), {})
    least = int(str(caught.value).split("(")[1].split(" ")[0])
    assert choose_mix(job, MixRequest(target=least), {}).nbytes <= least


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (MixRequest(stock=True, overrides=(parse_override("_exps=ccq2"),)), "ccq2 is unknown to stock llama.cpp"),
        (MixRequest(overrides=(parse_override("ffn_dwon=iq3_s"),)), "no tensor has such a name"),
    ],
)
def test_bad_requests(small_job: Job, request_: MixRequest, problem: str) -> None:
    with pytest.raises(QuantizeError, match=problem):
        choose_mix(small_job, request_, {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("iq3_s", "PATTERN=TYPE"),
        ("=iq3_s", "PATTERN=TYPE"),
        ("x=iq9_z", "no type 'iq9_z'"),
        ("(=iq3_s", "not a regular expression"),
    ],
)
def test_bad_overrides(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_override(text)


@pytest.mark.parametrize("text", ["", "0", "-3G", "3X", "G", "1e9", "nan"])
def test_bad_targets(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size above 0"):
        parse_target(text)


def test_rows_that_a_type_cannot_hold_fall_back_with_a_line(tmp_path: Path) -> None:
    """As llama-quantize does: experts of 96 columns in q4_0 instead of iq3_s, in q8_0 instead of q6_k."""
    from dataclasses import replace

    source = make(tmp_path / "narrow", replace(SMALL, expert_width=96))
    plain = prepare(source, Outtype.Q8_0)
    overrides = (parse_override("blk.1.ffn_down_exps=iq3_s"), parse_override("ffn_down_exps=q6_k"))
    mix = choose_mix(plain, MixRequest(overrides=overrides), {})
    types = {t.name: t.ggml_type for t in mix.job.plan.tensors}
    assert types["blk.1.ffn_down_exps.weight"] is GgmlType.Q4_0
    assert types["blk.2.ffn_down_exps.weight"] is GgmlType.Q8_0
    assert mix_json(mix)["notes"] == [
        "blk.1.ffn_down_exps.weight: rows of 96 are not a multiple of 256: q4_0 instead of iq3_s",
        "blk.2.ffn_down_exps.weight: rows of 96 are not a multiple of 256: q8_0 instead of q6_k",
    ]


def test_a_group_has_only_types_that_hold_its_rows(small_job: Job) -> None:
    for group in groups_of(small_job.plan, {}, ccq2_losses(small_job.plan), stock=True, rest=True):
        assert group.options
        assert all(option.ggml_type is not GgmlType.CCQ2 for option in group.options)
