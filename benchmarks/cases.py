"""Situations that users of pruning, quantisation and export tools report, each run to a verdict.

    python benchmarks/cases.py --out docs/results/cases.md

Every case of `benchmarks/case_models.py` is pruned by the default method. *Equal*: the proof holds; the budget is met
by torch's own counter; the user's model is untouched; the result, saved and loaded into a fresh model, answers the same
bits; and at every other input of the case (another batch, another image size) it equals the masked original, which is
analysed anew at that size. *Refused*: one of our errors. *Wrong*: anything else that does not hold. *Traceback*: an
exception that is not ours.
"""

import argparse
import platform
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from case_models import CASES, Case, Inputs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.cost.latency import device_name
from secateur.graph import named_tensors
from secateur.graph.capture import as_call
from secateur.graph.duplicate import duplicate
from secateur.proof.verify import randomise_


@dataclass(frozen=True)
class Verdict:
    """How a case ended, and why if not well."""

    word: str
    why: str = ""


def judge(case: Case) -> Verdict:
    """Run one case."""
    try:
        problems = run(case)
    except sc.SecateurError as error:
        expected = case.refused and case.refused in str(error)
        return Verdict("refused, as it should" if expected else "refused", str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error) or "no message").splitlines()[0]
        return Verdict(
            "traceback", f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
        )
    if case.refused:
        return Verdict("wrong", "a refusal was expected")
    return Verdict("wrong", "; ".join(problems)) if problems else Verdict("equal")


def run(case: Case) -> list[str]:
    """Prune one case and check all that must hold; what does not, in words."""
    model, inputs = fresh(case)
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = sc.prune(model, inputs, budget=sc.Budget(**case.budget), **case.options)
    problems = []
    if not (pruned.proof and pruned.proof.ok):
        problems.append(f"the proof does not hold: {pruned.proof}")
    after = dict(named_tensors(model))
    if before.keys() != after.keys() or any(not torch.equal(t, after[name]) for name, t in before.items()):
        problems.append("the user's model has changed")
    for measure, share in case.budget.items():
        dense, small = (measured(measure, m, inputs) for m in (model, pruned.model))
        if small > share * dense:
            problems.append(
                f"{small / dense:.3f} of the {measure} are left by torch's counter, {share} were asked for"
            )
    if case.check is not None and (problem := case.check(pruned, inputs)):
        problems.append(problem)
        return problems
    if case.check is None:
        problems += loads(case, pruned.model, inputs)
        for other in case.others:
            problems += holds_at(case, model, pruned, other)
    return problems


def fresh(case: Case) -> tuple[nn.Module, Inputs]:
    """The case's model, with weights that hide nothing, and its inputs."""
    torch.manual_seed(0)
    model, inputs = case.make()
    return randomise_(model, 0).eval(), inputs


def measured(measure: str, model: nn.Module, inputs: Inputs) -> int:
    """MACs of the whole batch as torch counts them, or parameters."""
    if measure == "params":
        return sum(p.numel() for p in model.parameters())
    args, kwargs = as_call(inputs)
    model = duplicate(model).requires_grad_(False)  # the counter would hang its hooks on gradients
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def loads(case: Case, model: nn.Module, inputs: Inputs) -> list[str]:
    """Whether the saved model, loaded into a fresh one, answers the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        sc.save(model, Path(folder) / "model.safetensors")
        loaded = sc.load(fresh(case)[0], Path(folder) / "model.safetensors")
    answers = [outputs(one, inputs) for one in (model, loaded)]
    same = len(answers[0]) == len(answers[1]) and all(map(torch.equal, *answers))
    return [] if same else ["the loaded model answers something else"]


def holds_at(case: Case, model: nn.Module, pruned: sc.Pruned, other: Inputs) -> list[str]:
    """Whether the result equals the masked original at other inputs."""
    sizes = " ".join(
        "×".join(map(str, x.shape)) for x in pytree.tree_leaves(other) if isinstance(x, torch.Tensor)
    )
    try:
        outputs(pruned.model, other)
        graph = sc.analyze(model, other, freeze=case.options.get("freeze", ()))
        proof = sc.verify(model, pruned.model, graph, pruned.plan)
    except Exception as error:
        return [f"at {sizes}: {type(error).__name__}: {str(error).splitlines()[0]}"]
    return [] if proof.ok else [f"at {sizes}: {proof}"]


def outputs(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        found = model.eval()(*args, **kwargs)
    found = vars(found) if not isinstance(found, torch.Tensor) and hasattr(found, "__dict__") else found
    return [x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--only", help="run the cases whose name holds this")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    verdicts: list[tuple[Case, Verdict]] = []
    for case in CASES:
        if chosen.only is None or chosen.only in case.name:
            verdict = judge(case)
            verdicts.append((case, verdict))
            print(f"{case.name}: {verdict.word}{f' ({verdict.why})' if verdict.why else ''}", flush=True)
    if chosen.out:
        chosen.out.write_text(page(verdicts))


def page(verdicts: list[tuple[Case, Verdict]]) -> str:
    """The page of results."""
    counts: dict[str, int] = {}
    for _, verdict in verdicts:
        counts[verdict.word] = counts.get(verdict.word, 0) + 1
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    lines = [
        "# Situations that users report",
        "",
        "`python benchmarks/cases.py --out docs/results/cases.md`",
        "",
        f"{len(verdicts)} cases: {', '.join(f'{n} {word}' for word, n in sorted(counts.items()))}. torch "
        f"{torch.__version__}, {device_name('cpu')}, Python {platform.python_version()}.",
        "",
        about,
        "",
        "| case | what is asked | other inputs | verdict |",
        "|---|---|---|---|",
    ]
    for case, verdict in verdicts:
        why = f": {verdict.why}" if verdict.why else ""
        lines.append(
            f"| {case.name} | {case.asked} | {len(case.others) or ''} | {verdict.word}{why} |".replace(
                "\n", " "
            )
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
