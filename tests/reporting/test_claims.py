"""Published claims beside what was measured, and chains told stage by stage."""

from made_records import RECORDS, good, make, megabytes_of, weighed

from harness.analysis import comparison
from harness.records.record import Cost
from harness.reporting import claims


def claims_of(records):
    [group] = comparison.group_records(records)
    table = claims.claims_table(group)
    return {(row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_claims_are_judged_by_rows_and_named():
    teacher = weighed("teacher", "teacher", 0.9, decode=1.0, megabytes=8, seconds=0)
    packed = good("int8", teacher, 2, family="quantization", decode=2.5, megabytes=2, seconds=3)
    slow = good("int4", teacher, 2, family="quantization", decode=1.2, megabytes=1, seconds=3)
    zeros = good("prune-wanda", teacher, 100, family="pruning", decode=1.0, megabytes=8, seconds=30)
    trained = good(
        "response", teacher, 60, family="distillation", decode=2.0, megabytes=4, seconds=200
    )
    claim_lines = claims_of([teacher, packed, slow, zeros, trained])
    assert (
        claim_lines["Quantization", "accuracy retention"]["verdict"]
        == "holds here (int4, 2 of 2 rows)"
    )
    assert (
        claim_lines["Quantization", "decode speedup (over float32)"]["verdict"]
        == "holds here (int8, 1 of 2 rows)"
    )
    assert (
        claim_lines["Quantization", "decode speedup (over float32)"]["measured"] == "1.20 to 2.50 x"
    )
    assert claim_lines["Quantization", "all at once"]["verdict"] == "holds here (int8, 1 of 2 rows)"
    for name in ("accuracy retention", "decode speedup (over float32)", "memory reduction (disk)"):
        assert claim_lines["Pruning", name]["verdict"] == "does not"
    assert claim_lines["Distillation", "memory reduction (disk)"]["claimed"] == "3 to 10 x"
    assert (
        claim_lines["Low-rank", "accuracy retention"] | {"measured": "-"}
        == claim_lines["Low-rank", "accuracy retention"]
    )
    assert claim_lines["Low-rank", "all at once"]["verdict"] == "not testable here"
    assert [
        claim_lines[name, "training cost"]["verdict"]
        for name in ("Quantization", "Pruning", "Distillation")
    ] == ["holds here"] * 3
    assert claim_lines["Quantization", "accuracy retention"]["published"].startswith(
        "MMLU 34.2 to 101.1 %, GSM8K 62.0 to 104.7 %, other 98.9 % (0.5B"
    )
    assert claim_lines["Low-rank", "decode speedup (over float32)"]["published"] == "-"
    assert claim_lines["Chains", "all at once"]["verdict"] == "not testable here"
    chain = good("a+b", teacher, 4, family="chain", decode=2.0, megabytes=0.5, seconds=9)
    assert (
        claims_of([teacher, packed, slow, chain])["Chains", "all at once"]["verdict"]
        == "holds here (a+b)"
    )
    # smaller, and keeps too little
    poor_chain = good("a+b", teacher, 160, family="chain", decode=2.0, megabytes=0.5, seconds=9)
    assert (
        claims_of([teacher, packed, slow, poor_chain])["Chains", "all at once"]["verdict"]
        == "does not"
    )
    # int4 alone is as small and keeps more
    large_chain = good("a+b", teacher, 40, family="chain", decode=2.0, megabytes=1, seconds=9)
    assert (
        claims_of([teacher, packed, slow, large_chain])["Chains", "all at once"]["verdict"]
        == "does not"
    )
    # as small, two items fewer: nobody knows
    close_chain = good("a+b", teacher, 4, family="chain", decode=2.0, megabytes=1, seconds=9)
    assert (
        claims_of([teacher, packed, slow, close_chain])["Chains", "all at once"]["verdict"]
        == "cannot tell"
    )
    dear = claims_of([teacher, packed.model_copy(update={"cost": Cost(seconds=500)}), trained])
    assert (
        dear["Quantization", "training cost"]["verdict"]
        == dear["Distillation", "training cost"]["verdict"]
        == "does not"
    )


def test_a_teacher_at_chance_makes_retention_untestable():
    teacher = weighed(
        "teacher",
        "teacher",
        0.25,
        decode=1.0,
        megabytes=8,
        seconds=0,
        task="mmlu-mini",
        chance=0.25,
    )
    packed = weighed(
        "int8",
        "quantization",
        0.25,
        decode=2.5,
        megabytes=2,
        seconds=3,
        task="mmlu-mini",
        chance=0.25,
    )
    claim_lines = claims_of([teacher, packed])
    assert claim_lines["Quantization", "accuracy retention"]["verdict"] == "not testable here"
    assert claim_lines["Quantization", "accuracy retention"]["measured"] == "-"
    assert (
        claim_lines["Quantization", "decode speedup (over float32)"]["verdict"]
        == "holds here (int8)"
    )
    assert claim_lines["Quantization", "all at once"]["verdict"] == "not testable here"


def test_claims_stand_only_where_something_was_compressed():
    assert claims.claims_table(comparison.group_records(RECORDS)[0]) is None


def test_a_chain_is_told_stage_by_stage_with_the_product_of_its_parts():
    from harness.records.record import StageRecord

    teacher = make("teacher", 0.9)
    first, last = good("a", teacher, 90, family="pruning", decode=1.5, megabytes=4, seconds=2), None
    last = good("b", teacher, 36, family="quantization", decode=2, megabytes=2, seconds=1)
    chain = good("a+b", teacher, 120, family="chain", decode=2.5, megabytes=1, seconds=3)
    stages = tuple(
        StageRecord(
            label=label,
            method=label[-1],
            key=label,
            digest="d",
            weight_bytes=size * 2**20,
            cost=Cost(seconds=seconds),
        )
        for label, size, seconds in (("a", 4, 2.0), ("a+b", 1, 1.0))
    )
    chain = chain.model_copy(update={"stages": stages})
    [group] = comparison.group_records([teacher, first, last, chain])
    table = claims.chains_table(group)
    lines = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [line["stage"] for line in lines] == ["a", "a+b"] and [
        line["stage s"] for line in lines
    ] == ["2.0", "1.0"]
    correct = teacher.scores[0].outcomes["strict-match"].count("1")
    product = (correct - 90) / correct * (correct - 36) / correct
    assert (
        lines[1]["retention of the parts"] == f"{100 * product:.1f} %"
        and lines[0]["retention of the parts"] == "-"
    )
    assert lines[1]["retention"].startswith(f"{100 * (correct - 120) / correct:.1f} %")
    assert lines[1]["decode x of the parts"] == "3.00" and lines[1]["decode x"] == "2.50"
    assert (lines[1]["MiB"], lines[1]["MiB of the parts"]) == (
        "1.00",
        f"{4 * 2 / megabytes_of(teacher):.2f}",
    )
