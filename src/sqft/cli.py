"""The command line: one sub-command a stage, flags from its config class. Exit codes: 0 done, 1 failed or interrupted,
2 wrong usage. Results go to standard output (``--json`` for machines), progress and messages to standard error."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sqft
from sqft import processes
from sqft.artifact import accept, write_text
from sqft.config import DATA_DIR, SHARED, TASK, QuantizeConfig
from sqft.console import Patient, answer, describe, ended_like_ctrl_c, note, quiet
from sqft.deployment import BenchConfig, GenerateConfig, ServeConfig
from sqft.errors import SqftError, UsageError
from sqft.flags import Parser, add_flags, inherit, number, read_flags
from sqft.limits import keep_no_addresses
from sqft.options import COUNT, RenamedOption
from sqft.outputs import clean
from sqft.registry import KINDS
from sqft.stages import ROWS, STAGES

DEVICE = "where to compute: cpu, cuda, cuda:1, xpu, mps; auto: an accelerator if there is one"
DRY_RUN = "show the stages, and about what they take; loads and writes nothing"

Add = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]  # (name, function, help) -> its parser


def build_parser() -> Parser:
    parser = Parser(prog="sqft", description="Adapt a sparse language model and merge it back into one sparse model.")
    parser.add_argument("--version", action="version", version=f"sqft {sqft.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    add = _adder(commands)

    _add_stages(add)
    _add_runs(add)
    _add_tools(add)
    commands.add_parser("lm-eval", add_help=False, help="lm-evaluation-harness's own commands, with --model sqft")
    return parser


def _add_stages(add: Add) -> None:
    for row in ROWS:
        sub = add(row.name, _stage, row.help)
        sub.add_argument("source", metavar=row.argument, help=row.takes)
        if row.makes != "numbers":
            sub.add_argument("out", metavar="OUT", help=row.writes)
        elif row.writes:
            sub.add_argument("--out", metavar="OUT", help=row.writes)
        sub.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")
        if row.name == "sparsify":
            sub.epilog = ("'--then quantize' and options of 'sqft quantize' after all others quantizes in the same "
                          "walk; calibration, dtype and device are for both, unless given there.")  # fmt: skip
        add_flags(sub, row.config)


def _add_runs(add: Add) -> None:
    sub = add("run", _run, "run all stages of a recipe; skips what is unchanged, resumes what was interrupted")
    _positional(sub, RECIPE="YAML file, or the name of a shipped recipe")
    sub.add_argument("--model", help="instead of the recipe's model")
    sub.add_argument("--output", help="instead of the recipe's output folder")
    sub.add_argument("--task", metavar="STR", help="instead of the recipe's task")
    sub.add_argument("--data-dir", metavar="STR", help=DATA_DIR)
    sub.add_argument("--device", metavar="STR", help=f"{DEVICE} [the recipe's]")
    _adapter(sub, "the recipe's")
    sub.add_argument("--dry-run", action="store_true", help=DRY_RUN)

    sub = add("demo", _run, "SmolLM2-135M: prune to 50 %%, quantize to INT4, adapt, merge, compare; 10 to 20 minutes")
    sub.set_defaults(recipe="demo")
    sub.add_argument("--device", metavar="STR", help=f"{DEVICE} [auto]")
    _adapter(sub, "qa-sparse-peft")
    sub.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    sub.add_argument("--model", help="another model than SmolLM2-135M")
    sub.add_argument("--output", help="folder to write (default: runs/demo)")

    sub = add("compare", _compare, "the paper's table for a model and a task; or what differs between two runs")
    sub.add_argument("what", metavar="RECIPE | RUN RUN", nargs="*",
                     help="a recipe with 'compare', by file or name [compare]; or two folders")  # fmt: skip
    sub.add_argument("--model", help="instead of the recipe's model")
    sub.add_argument("--output", help="instead of the recipe's output folder")
    sub.add_argument("--task", help="instead of the recipe's task")
    sub.add_argument("--data-dir", metavar="STR", help=DATA_DIR)
    sub.add_argument("--device", metavar="STR", help=f"{DEVICE} [the recipe's]")
    sub.add_argument("--sparsity", metavar="X", help="one or several, e.g. 0.3,0.5,0.7")
    sub.add_argument("--methods", metavar="STR", help="some of the rows, e.g. dense,lora,sparse-peft")


def _adapter(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--adapter", metavar="STR", help=f"another kind of adapter: {', '.join(KINDS)} [{default}]")
    sub.add_argument("--pipeline", metavar="STR", help=argparse.SUPPRESS)  # its name until 0.1


def _add_tools(add: Add) -> None:
    sub = add("write-tasks", _write_tasks, "write a task as YAML and data that lm-evaluation-harness runs offline")
    _positional(sub, TASK=TASK, OUT="folder to write")
    sub.add_argument("--data-dir", metavar="STR", help=DATA_DIR)
    sub.add_argument("--split", default="test", metavar="STR", help="split of the task [test]")
    sub.add_argument("--limit", type=number("limit", COUNT), metavar="INT", help="use the first N problems")
    sub.add_argument(
        "--fewshot",
        type=number("fewshot", "[0, 1000]"),
        default=0,
        metavar="INT",
        help="solved examples before each problem [0]",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")

    sub = add("generate", _generate, "let a model answer a prompt, as fast as this machine can")
    sub.add_argument("source", metavar="MODEL", help="folder of any stage, .gguf file or hub name")
    sub.add_argument("prompt", metavar="PROMPT", help="what to answer, or continue with --plain; -: standard input")
    add_flags(sub, GenerateConfig)

    sub = add("serve", _serve, "answer requests of the OpenAI client, by transformers' server and the fastest kernels")
    sub.add_argument("source", metavar="MODEL", help="folder of any stage, .gguf file or hub name")
    add_flags(sub, ServeConfig)

    sub = add("bench", _bench, "size, loading, memory and tokens a second of models in the runtimes that are here")
    sub.add_argument("models", metavar="MODEL", nargs="+", help="folders of any stage; an adapter goes with its base")
    sub.add_argument("--out", metavar="OUT", default="runs/bench", help="folder of exports and bench.json [runs/bench]")
    sub.add_argument("--python", metavar="NAME=PATH", action="append", default=[],
                     help="a runtime that another environment has, e.g. vllm=.venv-vllm/bin/python")  # fmt: skip
    add_flags(sub, BenchConfig)

    sub = add("inspect", _inspect, "what a model is to sqft: blocks, weights, what fits, what stages would take")
    sub.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub name; only its configuration is read")

    sub = add("report", _report, "write an HTML page and Markdown of folders of runs: charts, tables, samples")
    sub.add_argument("folders", metavar="FOLDER", nargs="+", help="output of 'sqft run' or 'sqft compare', or any")
    sub.add_argument("--out", metavar="FILE.html", help="file to write (default: report.html in the first folder)")

    sub = add("clean", _clean, "remove what processes that died left: unfinished results, checkpoints, locks")
    _positional(sub, FOLDER="folder to look in, for outputs of any stage; what a process is writing stays")

    sub = add("verify", _verify, "whether a stage's folder is what was written, and what is wrong with it if not")
    _positional(sub, FOLDER="folder of any stage")
    sub.add_argument("--deep", action="store_true", help="also all that it was made from")
    sub.add_argument("--accept", action="store_true", help="take the files as they are now: another result from now on")

    sub = add("ls", _ls, "list the stage folders under a folder, with their numbers")
    sub.add_argument("root", metavar="RUNS", nargs="?", default=".", help="folder to look in (default: here)")


def _adder(commands: Any) -> Add:
    def add(name: str, function: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--infer", action="store_true", help="work on model types that sqft does not know, too")
        sub.add_argument("-v", "--verbose", action="store_true", help="show logs and, on an error, where it came from")
        sub.set_defaults(function=function)
        return sub

    return add


def _positional(sub: argparse.ArgumentParser, **names: str) -> None:
    for name, text in names.items():
        sub.add_argument(name.lower(), metavar=name, help=text)


def _stage(arguments: argparse.Namespace) -> dict[str, Any]:
    row = STAGES[arguments.command]
    config = read_flags(arguments, row.config)
    given = {"out": arguments.out, "overwrite": arguments.overwrite}
    if arguments.then is not None:
        then = read_flags(inherit(arguments.then, arguments, SHARED), QuantizeConfig)
        row, config, given = STAGES["quantize"], then, {**given, "first": config}
    return row.perform(config, lambda: row.function(arguments.source, config, **given), _say)


def _split_then(arguments: Sequence[str]) -> tuple[list[str], argparse.Namespace | None]:
    """'sparsify ... --then quantize ...': the arguments before it, and those after, parsed."""
    if "--then" not in arguments:
        return list(arguments), None
    at = list(arguments).index("--then")
    head, tail = list(arguments[:at]), list(arguments[at + 1 :])
    if head[:1] != ["sparsify"] or tail[:1] != ["quantize"]:
        raise UsageError("--then goes with sparsify: sqft sparsify MODEL OUT [options] --then quantize [its options]")
    parser = Parser(prog="sqft sparsify ... --then quantize", add_help=False)
    add_flags(parser, QuantizeConfig)
    return head, parser.read(tail[1:])


def _write_tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    from sqft.evaluation.harness_tasks import write_tasks

    names = write_tasks(arguments.task, arguments.out, data_dir=arguments.data_dir, split=arguments.split,
                        limit=arguments.limit, fewshot=arguments.fewshot, overwrite=arguments.overwrite)  # fmt: skip
    return {"lm_eval_tasks": ",".join(names)}


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from sqft.recipe import load_recipe, with_adapter, with_options
    from sqft.reporting.collect import read_section
    from sqft.reporting.facts import stage_table

    recipe = load_recipe(arguments.recipe)
    if arguments.pipeline:
        warnings.warn("'--pipeline' is now called '--adapter'", RenamedOption, stacklevel=2)
    if arguments.adapter or arguments.pipeline:
        recipe = with_adapter(recipe, arguments.adapter or arguments.pipeline)
    given = {name: getattr(arguments, name, None) for name in ("task", "data_dir", "device")}
    recipe = with_options(recipe, **given)
    if arguments.dry_run:
        from sqft.planning.dry_run import dry_run, show

        found = dry_run(recipe, model=arguments.model, output=arguments.output)
        if not arguments.json:
            show(found)
        return found
    recipe = recipe.at(arguments.model, arguments.output)
    results, output = sqft.run(recipe, say=_say), Path(recipe.output)
    _tabulate(stage_table(read_section(output)), output, arguments)
    if not arguments.json:
        if "merge" in results:
            difference = results["merge"]["max_logit_difference"]
            print(f"Merged model: {output / 'merge'} (largest logit difference to un-merged: {difference:.2g})")
        if "search" in results and recipe["evaluate"] and recipe["evaluate"].task:
            print(f"Ranks were chosen by {results['search']['scored_on']}; the table's accuracy is on the "
                  f"{recipe['evaluate'].split} split, measured once.")  # fmt: skip
        if arguments.command == "demo":
            print("Other adapters: sqft demo --adapter sparse-peft (one sparse float model) | sqft | lora (base and "
                  "adapter, not mergeable)")  # fmt: skip
    return results


def _compare(arguments: argparse.Namespace) -> Any:
    from sqft.comparison import compare, with_methods
    from sqft.recipe import load_recipe, with_options
    from sqft.reporting.collect import read_section
    from sqft.reporting.facts import method_table
    from sqft.reporting.listing import difference

    if len(arguments.what) > 2:
        raise UsageError("sqft compare takes a recipe, or two folders of runs")
    if len(arguments.what) == 2:
        table = difference(Path(arguments.what[0]), Path(arguments.what[1]))
        if not arguments.json:
            table.show()
        return table.rows
    recipe = load_recipe(*arguments.what or ["compare"])
    recipe = with_options(recipe, task=arguments.task, data_dir=arguments.data_dir, device=arguments.device)
    recipe = with_methods(recipe, arguments.sparsity, arguments.methods).at(arguments.model, arguments.output)
    result = compare(recipe, say=_say)
    _tabulate(method_table(read_section(Path(recipe.output)), folders=True), Path(recipe.output), arguments)
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _tabulate(table: Any, output: Path, arguments: argparse.Namespace) -> None:
    write_text(output / "table.md", table.markdown())
    if not arguments.json:
        table.show()


def _generate(arguments: argparse.Namespace) -> dict[str, Any]:
    from sqft.calibration.data import read_input
    from sqft.serving.generate import generate

    prompt = read_input(sys.stdin) if arguments.prompt == "-" else arguments.prompt
    found = generate(arguments.source, prompt, read_flags(arguments, GenerateConfig),
                     say=(lambda piece: None) if arguments.json else partial(print, end="", flush=True))  # fmt: skip
    if arguments.json:
        return found
    print()
    _say(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items() if name != "text"))
    return {}


def _serve(arguments: argparse.Namespace) -> dict[str, Any]:
    from sqft.serving.serve import serve

    serve(arguments.source, read_flags(arguments, ServeConfig), say=_say)
    return {}


def _bench(arguments: argparse.Namespace) -> Any:
    from sqft.benching.run import bench
    from sqft.benching.table import table_of

    if wrong := [given for given in arguments.python if "=" not in given]:
        raise UsageError(f"--python is {wrong[0]}: write NAME=PATH, e.g. vllm=.venv-vllm/bin/python")
    pythons = dict(given.split("=", 1) for given in arguments.python)
    rows = bench(arguments.models, read_flags(arguments, BenchConfig), pythons=pythons, out=arguments.out, say=_say)
    _tabulate(table_of(rows), Path(arguments.out), arguments)
    return rows


def _inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    from sqft.inspection import inspect, show

    found = inspect(arguments.model)
    if not arguments.json:
        show(found)
    return found


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from sqft.reporting.page import report

    return report(arguments.folders, arguments.out)


def _ls(arguments: argparse.Namespace) -> Any:
    from sqft.reporting.listing import stages_table

    table = stages_table(Path(arguments.root))
    if not arguments.json:
        table.show()
    return table.rows


def _verify(arguments: argparse.Namespace) -> Any:
    from sqft.checking import verify_folder

    if arguments.accept:
        accept(arguments.folder)
    rows = verify_folder(arguments.folder, arguments.deep)
    for row in rows if not arguments.json else ():
        print(f"{row['folder']} ({row['stage']}): {row['checked']}: {'wrong' if row['problems'] else 'as written'}")
    if problems := [problem for row in rows for problem in row["problems"]]:
        if arguments.json:
            print(json.dumps(rows, indent=2))
        raise SqftError(f"{len(problems)} of {arguments.folder} is not as it should be: {'; '.join(problems)}")
    return rows


def _clean(arguments: argparse.Namespace) -> Any:
    rows = clean(arguments.folder)
    for row in rows if not arguments.json else ():
        print(f"{row['state']}: {row['path']}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = sys.stdout, sys.stderr, warnings.showwarning
    sys.stdout, sys.stderr, warnings.showwarning = Patient(sys.stdout, "standard output"), Patient(sys.stderr), note
    try:
        with ended_like_ctrl_c():
            return _main(given)
    finally:
        with contextlib.suppress(SqftError):  # it was said
            sys.stdout.flush()
        sys.stdout, sys.stderr, warnings.showwarning = before


def _main(given: list[str]) -> int:
    verbose, told = False, sys.stderr
    command = given[0] if given else ""
    try:
        if given[:1] == ["lm-eval"]:  # its flags are its own
            from sqft.evaluation.harness import lm_eval_command

            lm_eval_command(given[1:])
            return 0
        parser = build_parser()
        given, then = _split_then(given)
        parsed = parser.read(given)
        parsed.then = then
        if parsed.command is None:
            parser.print_help()
            return 0
        verbose = parsed.verbose
        quiet(verbose, parsed.command)
        if parsed.infer:
            from sqft.models.infer import allow

            allow()
        keep_no_addresses()
        with processes.joined() if parsed.command not in ("ls", "report") else contextlib.nullcontext():
            together = parsed.function in (_stage, _run, _compare)
            result = parsed.function(parsed) if together else processes.alone(lambda: parsed.function(parsed))
            answer(parsed.command, result, parsed.json)
        return 0
    except processes.Elsewhere as error:
        return error.code
    except (Exception, KeyboardInterrupt) as error:
        code = 2 if isinstance(error, UsageError) else 1
        if processes.is_first_to_fail(code):
            if verbose:
                traceback.print_exc(file=told)
            print(f"sqft: {describe(error, command)}", file=told)
        return code


if __name__ == "__main__":
    sys.exit(main())
