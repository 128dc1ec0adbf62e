"""Released per-pair results aggregate to the published table; damage is named by file and line."""

import json

import numpy as np
import pytest

from gim_jax.cli import main
from gim_jax.eval import compare, document, metrics, published, released, statistics

HEAD = "identifiers covisible0 covisible1 R_errs t_errs t_errs2 Bef.Prec Bef.Num Aft.Prec Aft.Num"


def row(name="s#a#b", overlap=0.3, R=1.0, t=2.0):
    return f"{name} {overlap} {overlap} {R} {t} 0.1 0.9 100 1.0 60"


def results(folder, *lines, name="[T] my_net           KITTI v1.txt"):
    (folder / name).write_text("\n".join([HEAD, *lines]) + "\n")
    return folder / name


def test_root_sift_gives_the_published_table_with_the_known_residuals(shared):
    """Figures of the project's analysis of the released files, to their printed digits."""
    content, skipped = document.from_released(shared / "data" / "zeb_results")
    (result,) = content["results"]
    want = [43.525, 33.601, 49.859, 48.667, 35.242, 22.332, 44.450, 14.190, 33.444, 7.618, 14.807, 35.114, 31.904]
    columns = [*published.SETS, "mean"]
    np.testing.assert_allclose([result["percent"][c] for c in columns], want, atol=6e-4)
    xlsx = [0, 0, 0, 0, 0, 0.928, 0.362, -0.482, 0, 0, 0, 0, 0.067]
    np.testing.assert_allclose([result["residuals"]["xlsx"][c] for c in columns], xlsx, atol=6e-4)
    assert result["residuals"]["paper"]["GTA"] == pytest.approx(-8.79, abs=5e-3)
    assert result["residuals"]["README"]["GTA"] == pytest.approx(0.01, abs=5e-3)
    np.testing.assert_allclose(list(result["mean"]["auc"].values()), [0.3190, 0.3807, 0.4324], atol=5e-5)
    assert sum(record["num_failures"] for record in result["sets"]) == 735
    assert result["mean"]["num_pairs"] == 45916 and result["mean"]["complete"] and not result["notes"]
    assert skipped == ["README.md: not named '[T] <model> <set> <version>.txt'"]
    by_overlap = np.array(result["mean"]["auc_by_overlap"])
    np.testing.assert_allclose(by_overlap * 100, [3.3, 13.8, 21.0, 27.8, 30.0, 34.5, 44.1], atol=0.051)
    assert compare.rank_among_published(result) == pytest.approx(7.083, abs=0.09)  # in place of its own row


def test_ten_ranks_of_the_paper():
    got = compare.published_ranks()
    assert {name: round(rank, 3) for name, rank in got.items()} == published.MEAN_RANKS
    assert sum(got.values()) == pytest.approx(55)
    printed = {name: row["rank"] for name, row in published.ZEB["paper"].items() if name in got}
    assert [name for name in got if round(got[name], 1) != printed[name]] == ["GIM_LoFTR"]


def test_ranks_with_ties():
    np.testing.assert_array_equal(statistics.ranks([5, 7, 5, 1]), [2.5, 1, 2.5, 4])
    np.testing.assert_array_equal(statistics.ranks([5, 7, 5, 1], "min"), [2, 1, 2, 4])


def test_published_means_are_those_of_their_rows():
    for table in published.ZEB.values():
        for name, line in table.items():
            misprint = name == "RootSIFT" and line["GTA"] == 43.9
            mean = np.mean([line[c] for c in published.SETS])
            assert (abs(mean - line["mean"]) < 0.06) != misprint, name
    for line in published.IN_DOMAIN.values():
        assert np.mean(list(line.values())[:6]) == pytest.approx(line["mean"], abs=6e-3)
    assert sum(published.PAIRS.values()) == 45916


def test_first_line_of_a_pair_counts_and_missing_poses_fail(tmp_path):
    lines = [row(R=2.5, t=1.0), row(R=0.1, t=0.1), row("s#a#c", R="inf", t="inf"), row("s#b#c", R=1, t="nan")]
    columns = released.read(results(tmp_path, *lines))
    np.testing.assert_array_equal(released.errors_deg(columns), [2.5, np.inf, np.inf])
    assert columns["num_duplicates"] == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("s#a#b 0.3", "found 2 tokens, expected 10"),
        (row(R="x"), "R_errs: found 'x', expected a number"),
        (row(R=-1), "R_errs: found -1, expected 0 to 180"),
        (row(t=181), "t_errs: found 181, expected 0 to 180"),
        (row(R="-inf"), "R_errs: found -inf"),
        (row(overlap=1.5), "covisible0: found 1.5, expected 0 to 1 and finite"),
        (row(overlap="nan"), "covisible0: found nan"),
        (row("plain"), "identifiers: found 'plain', expected scene#name0#name1"),
        (row("s#a#\x1b[2J"), "identifiers: found"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    path = results(tmp_path, row(), line)
    with pytest.raises(ValueError) as error:
        released.read(path)
    assert str(error.value).startswith(f"{path}:3: {message}")


def test_files_that_are_no_results(tmp_path):
    path = results(tmp_path, row())
    for data, message in (
        (b"", ":1: found the heading ''"),
        (b"identifiers R_errs\n", ":1: found the heading"),
        (HEAD.encode() + b"\n", "found no pair"),
        (HEAD.encode() + b"\n\xff\xfe", ":2: not text"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            released.read(path)
    with pytest.raises(ValueError, match="no such folder"):
        released.find(tmp_path / "none")
    path.rename(tmp_path / "[T] my_net           MARS v1.txt")
    with pytest.raises(ValueError, match="found no result file"):
        released.find(tmp_path)


def test_several_methods_each_with_its_mean_and_what_it_lacks(tmp_path, capsys):
    results(tmp_path, row(R=1, t=1))
    results(tmp_path, row(R=2.5, t=1), row("s#a#c", R="inf", t="inf"), name="[T] other  GL3D 50h.txt")
    results(tmp_path, row(), name="[T] other  Mars 50h.txt")
    out = tmp_path / "out.json"
    assert main(["eval", "--benchmark=zeb", "--from-results", str(tmp_path), "--json", str(out)]) == 1
    printed = capsys.readouterr()
    first, second = json.loads(out.read_text())["results"]
    assert first["method"] == "my_net v1" and first["percent"]["KIT"] == pytest.approx(100 * (0.5 + 4) / 5)
    assert second["percent"]["GL3"] == pytest.approx(100 * (0.5 * 2.5 / 2 + 0.5 * 2.5) / 5)
    assert first["mean"]["num_missing"] == 45915 and not first["mean"]["complete"]
    assert "90.00*" in printed.out and "not the mean of the whole benchmark" in printed.out
    assert "my_net v1: KIT: 1 pairs, the released set has 5013" in printed.out
    assert "set 'Mars', expected one of GL3D" in printed.err


def test_written_results_read_back_and_sort(tmp_path):
    columns = {"identifiers": ["s#b#c", "s#a#b"], "R_errs": [np.inf, 1 / 3], "t_errs": [np.inf, 2.0]}
    columns |= {"t_errs2": [np.inf, 0.1], "covisible0": [0.2, 0.7], "covisible1": [0.2, 0.7]}
    columns |= {"Bef.Prec": [0.0, 0.5], "Bef.Num": [0, 50], "Aft.Prec": [0.0, 1.0], "Aft.Num": [0, 40]}
    name = released.file_name("my net/../x", "KIT", "v1")
    assert name == "[T] my_net_.._x           KITTI v1.txt"
    released.write(tmp_path / name, columns)
    assert (tmp_path / name).read_text().splitlines()[1:] == [
        f"s#a#b 0.7 0.7 {1 / 3} 2.0 0.1 0.5 50 1.0 40",
        "s#b#c 0.2 0.2 inf inf inf 0.0 0 0.0 0",
    ]
    again = released.read(tmp_path / name)
    np.testing.assert_array_equal(again["R_errs"], [1 / 3, np.inf])


def test_bootstrap_is_the_auc_of_resampled_pairs():
    errors = np.random.default_rng(0).exponential(6, 40)
    errors[3] = np.inf
    draws = statistics.bootstrap_auc([errors], 5.0, num=7, seed=3)
    rng = np.random.default_rng([3, 0])
    for got, index in zip(draws[:, 0], rng.integers(0, 40, (7, 40))):
        assert got == pytest.approx(metrics.pose_auc(errors[index], [5])[0], abs=1e-12)


def test_overlap_bins_are_closed_above():
    errors, overlaps = [0, 0, np.inf, 0], [0.1, 0.1000001, 0.2, 1.0]
    found = statistics.overlap_auc(errors, overlaps)
    assert found[0] == [1, 1.0] and found[1] == [2, 0.5] and found[-1] == [1, 1.0] and found[2] == [0, None]


def test_compare_prints_both_and_their_difference(tmp_path, capsys):
    files = []
    for index, R in enumerate((4.0, 1.0)):
        folder = tmp_path / str(index)
        folder.mkdir()
        results(folder, *(row(f"s#a#{i}", R=R, t=0) for i in range(30)), name=f"[T] net{index}  KITTI v1.txt")
        files.append(str(folder / "out.json"))
        main(["eval", "--benchmark=zeb", "--from-results", str(folder), "--json", files[-1]])
    capsys.readouterr()
    png = tmp_path / "table.png"
    assert main(["eval", "compare", *files, "--png", str(png)]) == 1
    printed = capsys.readouterr().out
    # thirty equal errors: the recall rises from 0 to 1 / 30 up to the error and jumps to 1 there
    auc = [100 * (R / 60 + 5 - R) / 5 for R in (4, 1)]
    assert f"{auc[0]:.2f}*" in printed and f"{auc[1]:.2f}*" in printed
    assert "net1 v1 - net0 v1" in printed and f"{auc[1] - auc[0]:+.2f}" in printed
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "path",
    ["benchmark", *(f"results 0 {name}" for name in ("row", "percent", "percent mean", "residuals", "mean num_lost"))]
    + [f"results 0 {name}" for name in ("mean auc", "sets 0 num_lost", "sets 0 pairs identifier")],
)
def test_a_document_without_what_is_printed_is_named(tmp_path, path):
    results(tmp_path, *(row(f"s#a#{i}", R=1, t=0) for i in range(3)), name="[T] net  KITTI v1.txt")
    main(["eval", "--benchmark=zeb", "--from-results", str(tmp_path), "--json", str(tmp_path / "a.json")])
    document.load(tmp_path / "a.json")
    content = node = json.loads((tmp_path / "a.json").read_text())
    *parents, last = path.split()
    for word in parents:
        node = node[int(word) if isinstance(node, list) else word]
    del node[last]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json: not whole: "):
        document.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "found format 'list'"),
        ('{"format": "other"}', "found format 'other'"),
        ('{"format": "gim-jax evaluation 1", "benchmark": "zeb", "results": [{}]}', "not whole"),
    ],
)
def test_compare_refuses_other_files(tmp_path, capsys, text, message):
    (tmp_path / "a.json").write_text(text)
    assert main(["eval", "compare", str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and "a.json" in error and error.count("\n") == 1
