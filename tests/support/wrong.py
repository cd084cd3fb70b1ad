"""Wrong command lines and wrong data: what is typed, the exit code, and what has to be said.

python tests/support/wrong.py > docs/errors.md     # what is said of each today; tests/integration/test_wrong.py compares
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
STEPS = "--limit 4 --max-steps 1 --batch-size 2 --r 2"
TRAIN = f"train sparse out {STEPS}"
DATA = f"{TRAIN} --completion '{{a}}' --data"
TASK = f"{TRAIN} --task mine.yaml --data-dir tasks"

HEAD = f"""# What is said of wrong input

Written by `python tests/support/wrong.py`, from the list that `tests/integration/test_wrong.py` tries one by one: each makes
nothing, says one sentence and ends with the exit code beside it (2: what was asked for is wrong, 1: what was found). Files
are named by what is wrong with them; `tests/support/wrong.py` has their bytes. Behind `...` is `{STEPS}`."""

# What data files hold; a case names its file as it is here.
FILES: dict[str, bytes] = {
    "good.jsonl": b'{"q": "1+1", "a": "2"}\n' * 4,
    "good.txt": b"A text of some words.\n\n" * 40,
    "empty.jsonl": b"",
    "empty.txt": b"",
    "blank.txt": b"\n \n\n",
    "blank-texts.jsonl": b'{"text": " "}\n' * 3,
    "null.jsonl": b'{"a": "2"}\n{"a": null}\n',
    "nan.jsonl": b'{"a": "2"}\n{"a": NaN}\n',
    "infinity.jsonl": b'{"a": -Infinity}\n',
    "list.jsonl": b'{"a": ["2"]}\n',
    "object.jsonl": b'{"a": {"b": 1}}\n',
    "true.jsonl": b'{"a": true}\n',
    "other.jsonl": b'{"a": "2"}\n\n{"b": "2"}\n',
    "array.jsonl": b'[{"a": "2"}]\n',
    "string.jsonl": b'"a"\n',
    "cut.jsonl": b'{"a": "2"}\n{"a": "2\n',
    "deep.jsonl": b'{"a": ' + b"[" * 100_000 + b"\n",
    "digits.jsonl": b'{"a": ' + b"1" * 10_000 + b"}\n",
    "latin1.jsonl": '{"a": "2"}\n{"a": "é"}\n'.encode("latin-1"),
    "latin1.txt": "one\n\nzwei é\n".encode("latin-1"),
    "utf16.txt": "one\n".encode("utf-16"),
    "zero.txt": b"one\n\0\0\0\n",
    "cut.jsonl.gz": gzip.compress(b'{"a": "2"}\n' * 100)[:-12],
    "no.jsonl.gz": b'{"a": "2"}\n',
    "huge.jsonl": b'{"a": "' + b"x" * 2**24 + b'"}\n',
    "huge.txt": b"one\n\n" + b"x y z\n" * 2_800_000,
    "nothing.jsonl": b'{"a": "", "q": "x"}\n{"a": " ", "q": "x"}\n',
    "long.jsonl": b'{"a": "2", "q": "' + b"x" * 600 + b'"}\n',
    "data.csv": b"a,b\n1,2\n",
    "data.json": b'[{"a": "2"}]\n',
    "no-text.jsonl": b'{"text": "a b c"}\n{"body": "a"}\n',
    "null-text.jsonl": b'{"text": "a b c"}\n{"text": null}\n',
    "short.txt": b"one\n",
    "nulls/train.csv": b"a,q\n1,2\n,3\n",
    "mine.yaml": b"folder: mine\nsplits: {train: train, test: test}\nprompt: '{{q}}'\ncompletion: ' {{a}}'\nanswer: a\n",
    "wrong-answer.yaml": b"folder: mine\nsplits: {train: train}\nprompt: '{{q}}'\ncompletion: ' {{a.b.c}}'\nanswer: a\n",
    "list.yaml": b"- 1\n",
    "recipe.yaml": b"model: dense\noutput: out\nsparsify: {sparsity: nan}\n",
    "seed.yaml": b"model: dense\noutput: out\nsparsify:\n  seed: -1\n",
    "number.yaml": b"model: dense\noutput: out\ntrain: {task: arithmetic, lora_alpha: 0}\n",
    "empty.yaml": b"",
    "ranks.yaml": b"q_proj: nine\n",
    "tasks/mine/train.jsonl": b'{"q": "1", "a": "2"}\n{"q": "1"}\n',
    "empty/mine/train.jsonl": b"",
    "array/mine/train.json": b"[1]\n",
    "object/mine/train.json": b'{"q": "1"}\n',
    "bad/mine/train.json": b'[{"q": 1}, {"q": NaN}]\n',
    "same/mine/train.jsonl": b'{"q": "1", "a": "2"}\n' * 2,
    "same/mine/test.jsonl": b'{"q": "1", "a": "2"}\n',
    "a-file": b"a",
    "t5/config.json": b'{"model_type": "t5"}',
}  # fmt: skip

CASES: dict[str, list[tuple[str, int, str]]] = {
    "Commands, arguments and options that are none": [
        ("sparsyfy dense out", 2, "unknown command 'sparsyfy': did you mean 'sparsify'?"),
        ("sparsify", 2, "MODEL, OUT"),
        ("sparsify dense", 2, "OUT"),
        ("sparsify dense out more", 2, "unexpected argument 'more'"),
        ("sparsify dense ''", 2, "is empty"),
        ("sparsify '' out", 2, "is empty"),
        ("sparsify dense out --sparsty 0.5", 2, "did you mean '--sparsity'?"),
        ("sparsify dense out --qqq", 2, "'sqft sparsify --help' lists them"),
        ("sparsify dense out --sparsity", 2, "--sparsity"),
        ("sparsify dense out --infer=yes", 2, "--infer"),
        ("sparsify dense out --then merge", 2, "--then goes with sparsify"),
        ("sparsify dense out --then quantize --bitz 4", 2, "did you mean '--bits'?"),
        ("train sparse out --then quantize", 2, "--then goes with sparsify"),
    ],
    "Models and folders": [
        ("sparsify none out", 2, "no folder"),
        ("sparsify a-file out", 2, "a-file"),
        ("sparsify tasks out", 2, "not a model folder"),
        ("sparsify dense a-file", 2, "is a file"),
        ("sparsify dense a-file/out", 2, "not a writable folder"),
        ("sparsify dense dense", 2, "already holds something"),
        ("sparsify dense tasks --overwrite", 2, "not written by sqft"),
        ("train sparse sparse --overwrite --task arithmetic", 2, "the input sparse"),
        ("merge sparse out", 2, "not an adapter"),
        ("merge dense out", 2, "not an adapter"),
        ("train dense out --task arithmetic", 1, "not sparse"),
        ("train sparse out --task arithmetic --adapter qa-sparse-peft", 2, "is a float model"),
        ("evaluate none --text builtin", 2, "no folder"),
        ("unpack sparse out", 2, "sparse"),
        ("export sparse out --to gguff", 2, "did you mean 'gguf'?"),
        ("verify dense", 2, "was not written by sqft"),
        ("verify none", 2, "none"),
        ("clean none", 2, "no folder none"),
        ("ls none", 2, "none"),
        ("report none", 2, "none"),
        ("measure none", 2, "none"),
        ("bench none", 2, "none"),
        ("inspect none", 2, "none"),
        ("inspect t5", 1, "t5 is an encoder-decoder model"),
    ],
    "Numbers": [
        ("sparsify dense out --sparsity nan", 2, "sparsity: nan is not a finite number"),
        ("sparsify dense out --sparsity inf", 2, "sparsity: inf is not a finite number"),
        ("sparsify dense out --sparsity 1", 2, "sparsity is 1.0: it has to be less than 1"),
        ("sparsify dense out --sparsity=-0.5", 2, "it has to be greater than 0"),
        ("sparsify dense out --sparsity half", 2, "'half' is not a number"),
        ("sparsify dense out --sparsity ''", 2, "'' is not a number"),
        ("sparsify dense out --overrides down_proj=nan", 2, "not a finite number"),
        ("sparsify dense out --overrides down_proj", 2, "PATTERN=NUMBER"),
        ("sparsify dense out --overrides dwn_proj=0.4", 2, "did you mean 'down_proj'"),
        ("sparsify dense out --pattern 4:2", 2, "is not N:M"),
        ("sparsify dense out --pattern 2:5", 2, "does not divide"),
        ("sparsify dense out --samples 0", 2, "samples is 0: it has to be greater than 0"),
        ("sparsify dense out --samples inf", 2, "not a finite number"),
        ("sparsify dense out --samples 1e30", 2, "too large a number"),
        ("sparsify dense out --samples 2.5", 2, "not a whole number"),
        ("sparsify dense out --length 1", 2, "length is 1: it has to be at least 2"),
        ("sparsify dense out --length 100000", 1, "fewer than one block of 100000"),
        ("sparsify dense out --batch-size=-1", 2, "it has to be greater than 0"),
        ("sparsify dense out --seed=-1", 2, "seed is -1: it has to be at least 0"),
        ("sparsify dense out --seed 4294967296", 2, "it has to be at most 4294967295"),
        ("sparsify dense out --repair block --repair-rate nan", 2, "not a finite number"),
        ("sparsify dense out --repair-epochs 0", 2, "greater than 0"),
        ("quantize dense out --bits 5", 2, "choose 2, 3, 4 or 8"),
        ("quantize dense out --group-size 7", 2, "choose 32, 64, 128"),
        ("quantize dense out --scale-bits 20", 2, "scale_bits is 20"),
        ("quantize dense out --min-zero 2", 2, "min_zero is 2"),
        ("quantize dense out --format gptq", 2, "symmetric"),
        ("quantize dense out --repair block", 2, "give it to sparsify"),
        ("train sparse out --task arithmetic --r 0", 2, "r is 0"),
        ("train sparse out --task arithmetic --learning-rate inf", 2, "not a finite number"),
        ("train sparse out --task arithmetic --learning-rate=-1e-3", 2, "learning_rate is -0.001"),
        ("train sparse out --task arithmetic --learning-rate 1000", 2, "at most 10"),
        ("train sparse out --task arithmetic --epochs nan", 2, "not a finite number"),
        ("train sparse out --task arithmetic --max-steps 0", 2, "max_steps is 0"),
        ("train sparse out --task arithmetic --max-steps=-2", 2, "max_steps is -2"),
        ("train sparse out --task arithmetic --warmup-steps=-1", 2, "warmup_steps is -1"),
        ("train sparse out --task arithmetic --weight-decay=-1", 2, "weight_decay is -1"),
        ("train sparse out --task arithmetic --lora-dropout 1", 2, "less than 1"),
        ("train sparse out --task arithmetic --limit=-5", 2, "limit is -5"),
        ("train sparse out --task arithmetic --eval-limit=-5", 2, "eval_limit is -5"),
        ("train sparse out --task arithmetic --eval-steps=-5", 2, "eval_steps is -5"),
        ("train sparse out --task arithmetic --max-length 1", 2, "max_length is 1: it has to be at least 2"),
        ("train sparse out --task arithmetic --search-space 4,0", 2, "search_space is 0"),
        ("train sparse out --task arithmetic --search-space 4,x", 2, "'x' is not a number"),
        ("train sparse out --task arithmetic --distill-temperature 0", 2, "distill_temperature is 0"),
        ("train sparse out --task arithmetic --distill-logits nan", 2, "not a finite number"),
        ("search adapter out --task arithmetic --evaluations 0", 2, "evaluations is 0"),
        ("search adapter out --task arithmetic --workers=-1", 2, "workers is -1"),
        ("search adapter out --task arithmetic --screen 0", 2, "screen is 0"),
        ("search adapter out --task arithmetic --screen-keep 2", 2, "screen_keep is 2"),
        ("merge adapter out --tolerance inf", 2, "not a finite number"),
        ("merge adapter out --tolerance=-1", 2, "tolerance is -1"),
        ("merge adapter out --max-shard-size 5", 2, "is not a size"),
        ("merge adapter out --max-shard-size nanGB", 2, "is not a size"),
        ("merge adapter out --ranks median", 2, "rank is fixed"),
        ("evaluate sparse --text builtin --length 1", 2, "length is 1"),
        ("evaluate sparse --text builtin --max-tokens=-5", 2, "max_tokens is -5"),
        ("evaluate sparse --task arithmetic --limit 0", 2, "limit is 0"),
        ("evaluate sparse --task arithmetic --fewshot 2", 2, "few-shot examples are lm-eval's"),
        ("generate sparse hello --temperature nan", 2, "not a finite number"),
        ("generate sparse hello --top-p 1.5", 2, "top_p is 1.5: it has to be at most 1"),
        ("generate sparse hello --max-new-tokens 0", 2, "max_new_tokens is 0"),
        ("generate sparse ''", 2, "PROMPT is empty"),
        ("serve sparse --port 70000", 2, "port is 70000"),
        ("bench sparse --batch 0", 2, "batch is 0"),
        ("bench sparse --python vllm", 2, "NAME=PATH"),
        ("write-tasks arithmetic out --limit x", 2, "'x' is not a number"),
        ("write-tasks arithmetic out --limit=-1", 2, "limit is -1"),
        ("write-tasks arithmetic out --fewshot=-1", 2, "fewshot is -1"),
        ("compare recipe.yaml --sparsity nan", 2, "nan"),
    ],
    "Names": [
        ("sparsify dense out --method wnada", 2, "did you mean 'wanda'?"),
        ("sparsify dense out --device cup", 2, "cup"),
        ("sparsify dense out --dtype int8", 2, "unknown dtype 'int8'"),
        ("sparsify dense out --exclude lm_head", 2, "matches no module"),
        ("sparsify dense out --mask none.safetensors", 2, "none.safetensors"),
        ("train sparse out", 2, "nothing to train on"),
        ("train sparse out --task arithmetik", 2, "did you mean 'arithmetic'?"),
        ("train sparse out --task arithmetic --data good.jsonl", 2, "exclude each other"),
        ("train sparse out --task arithmetic --data-dir tasks", 2, "makes its problems itself"),
        ("train sparse out --task arithmetic --target-modules q_poj", 2, "did you mean 'q_proj'"),
        ("train sparse out --task arithmetic --adapter sparsepeft", 2, "unknown adapter"),
        ("train sparse out --task arithmetic --rank-groups layer", 2, "rank_groups go with a search_space"),
        ("train sparse out --task arithmetic --auto-batch --search-space 2,1 --rank-every micro-batch", 2, "auto_batch"),
        ("search elastic out", 2, "give a task"),
        ("search elastic out --task arithmetic --split test", 2, "must not see the test split"),
        ("search adapter out --task arithmetic --pick kneee", 2, "'kneee' picks nothing"),
        ("merge adapter out --ranks ranks.yaml", 2, "rank is fixed"),
        ("evaluate sparse", 2, "nothing to evaluate"),
        ("evaluate sparse --task arithmetic --split tset", 2, "no split 'tset'"),
        ("run none", 2, "no recipe none"),
        ("run pipe.jsonl", 2, "no recipe pipe.jsonl"),
        ("run list.yaml", 2, "it has to be a mapping"),
        ("run empty.yaml", 2, "it has to be a mapping"),
        ("run recipe.yaml", 2, "recipe.yaml:3: sparsity: nan is not a finite number"),
        ("run seed.yaml", 2, "seed is -1"),
        ("run number.yaml", 2, "lora_alpha is 0"),
        ("run tasks", 2, "tasks"),
    ],
    "Training data": [
        (f"{DATA} none.jsonl", 2, "there is no file none.jsonl"),
        (f"{DATA} tasks/mine/train.jsonl", 2, "train.jsonl:2: the record has no field 'a'"),
        (f"{DATA} empty.jsonl", 1, "empty.jsonl is empty"),
        (f"{DATA} null.jsonl", 1, "null.jsonl:2: field 'a' is null"),
        (f"{DATA} nan.jsonl", 1, "nan.jsonl:2: not JSON (NaN"),
        (f"{DATA} infinity.jsonl", 1, "infinity.jsonl:1: not JSON (-Infinity"),
        (f"{DATA} list.jsonl", 1, "list.jsonl:1: field 'a' is a list"),
        (f"{DATA} object.jsonl", 1, "object.jsonl:1: field 'a' is an object"),
        (f"{DATA} true.jsonl", 1, "true.jsonl:1: field 'a' is true or false"),
        (f"{DATA} other.jsonl", 2, "other.jsonl:3: the record has no field 'a'"),
        (f"{DATA} array.jsonl", 1, "array.jsonl:1: a line has to be a JSON object"),
        (f"{DATA} string.jsonl", 1, "string.jsonl:1: a line has to be a JSON object"),
        (f"{DATA} cut.jsonl", 1, "cut.jsonl:2: not JSON"),
        (f"{DATA} deep.jsonl", 1, "deep.jsonl:1: not JSON"),
        (f"{DATA} digits.jsonl", 1, "digits.jsonl:1: not JSON"),
        (f"{DATA} latin1.jsonl", 1, "latin1.jsonl:2: not UTF-8 (byte 8 of the line)"),
        (f"{DATA} cut.jsonl.gz", 1, "cannot read cut.jsonl.gz"),
        (f"{DATA} no.jsonl.gz", 1, "cannot read no.jsonl.gz"),
        (f"{DATA} huge.jsonl", 1, "huge.jsonl:1: a line of more than"),
        (f"{DATA} data.csv", 2, "neither text nor JSON lines"),
        (f"{DATA} data.json", 2, "neither text nor JSON lines"),
        (f"{DATA} nulls", 1, "nulls, row 2: field 'a' is null"),
        (f"{DATA} /dev/zero", 2, "/dev/zero is a link to nothing, a pipe or a device"),
        (f"{DATA} pipe.jsonl", 2, "pipe.jsonl is a link to nothing, a pipe or a device"),
        (f"{DATA} endless.txt", 2, "endless.txt is a link to nothing, a pipe or a device"),
        (f"{DATA} folder.jsonl", 2, "folder.jsonl is a folder"),
        (f"{DATA} nothing.jsonl", 1, "of 2 examples 2 without a completion"),
        (f"{DATA} long.jsonl --prompt '{{q}}'", 1, "without room for their completion"),
        (f"{DATA} good.jsonl --eval-data null.jsonl", 1, "null.jsonl:2: field 'a' is null"),
        (f"{TRAIN} --data good.jsonl --completion '{{a'", 2, "completion '{a' is no template"),
        (f"{TRAIN} --data good.jsonl --completion '{{}}'", 2, "no template"),
        (f"{TRAIN} --data good.jsonl --completion '{{a:>5}}'", 2, "no template"),
        (f"{TRAIN} --data good.jsonl --completion '{{anser}}'", 2, "no field 'anser'"),
        (f"{TRAIN} --data good.jsonl", 2, "no field 'text'"),
    ],
    "Tasks": [
        (f"{TASK}", 2, "train.jsonl:2: the record does not fit its templates"),
        (f"{TRAIN} --task mine.yaml", 2, "give data_dir"),
        (f"{TRAIN} --task mine.yaml --data-dir nowhere", 2, "there is no folder nowhere"),
        (f"{TRAIN} --task mine.yaml --data-dir array", 1, "train.json, record 1: not a JSON object"),
        (f"{TRAIN} --task mine.yaml --data-dir object", 1, "is not a list of JSON objects"),
        (f"{TRAIN} --task mine.yaml --data-dir bad", 1, "NaN"),
        (f"{TRAIN} --task mine.yaml --data-dir empty", 1, "train.jsonl is empty"),
        (f"{TRAIN} --task mine.yaml --data-dir pipes", 2, "pipes/mine/train.jsonl is a link to nothing, a pipe"),
        (f"{TRAIN} --task mine.yaml --data-dir same", 1, "nothing is left to train on"),
        (f"{TRAIN} --task wrong-answer.yaml --data-dir same", 2, "does not fit its templates"),
    ],
    "Calibration and texts": [
        ("sparsify dense out --calibration empty.txt", 1, "empty.txt is empty"),
        ("sparsify dense out --spill nowhere", 2, "there is no folder nowhere to spill activations to"),
        ("sparsify dense out --calibration blank.txt", 1, "blank.txt is empty"),
        ("sparsify dense out --calibration blank-texts.jsonl", 1, "all of its 3 texts are blank"),
        ("sparsify dense out --calibration no-text.jsonl", 1, "no-text.jsonl:2: the record has no 'text' field"),
        ("sparsify dense out --calibration null-text.jsonl", 1, "null-text.jsonl:2: field 'text' is null"),
        ("sparsify dense out --calibration latin1.txt", 1, "latin1.txt:3: not UTF-8 (byte 6 of the line)"),
        ("sparsify dense out --calibration utf16.txt", 1, "utf16.txt:1: not UTF-8"),
        ("sparsify dense out --calibration zero.txt", 1, "zero.txt:2: a zero byte"),
        ("sparsify dense out --calibration huge.txt", 1, "huge.txt:3: a paragraph of more than"),
        ("sparsify dense out --calibration short.txt", 1, "fewer than one block"),
        ("sparsify dense out --calibration builtin+", 2, "names no text"),
        ("sparsify dense out --calibration builtin=0", 2, "names no text"),
        ("sparsify dense out --calibration no-such-data-set", 1, "as a datasets name it does not load"),
        (f"sparsify dense out --calibration {'x' * 300}.txt", 2, "which is no path or name"),
        ("evaluate sparse --text empty.txt", 1, "empty.txt is empty"),
        ("evaluate sparse --text /dev/zero", 2, "/dev/zero is a link to nothing"),
        ("evaluate sparse --text null-text.jsonl", 1, "null-text.jsonl:2"),
        (f"sparsify dense {'x' * 300}", 1, "File name too long"),
    ],
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Models and data of the cases."""
    sys.path[:0] = [str(TESTS)]
    import torch
    from pico import pico_folder

    import sqft

    pico_folder(folder / "dense")
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    sqft.sparsify(folder / "dense", sqft.SparsifyConfig(), tokens, out=folder / "sparse")
    examples = [sqft.Example(f"{i}+{i}=", f" {2 * i}", str(2 * i)) for i in range(8)]
    for name, options in (("adapter", {}), ("elastic", {"search_space": [4, 2]})):
        config = sqft.TrainConfig(max_steps=1, batch_size=2, r=2, **options)
        sqft.train(folder / "sparse", config, examples, out=folder / name)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "folder.jsonl").mkdir()
    (folder / "pipes" / "mine").mkdir(parents=True)
    for name in ("pipe.jsonl", "pipes/mine/train.jsonl"):
        os.mkfifo(folder / name)
    (folder / "endless.txt").symlink_to("/dev/zero")


def said(command: str) -> tuple[int, str]:
    """The exit code of a command line that is run here, and what standard error has."""
    import sqft.cli

    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = sqft.cli.main(shlex.split(command))
    return code, err.getvalue().replace(os.getcwd(), ".")


def row(command: str, code: int, err: str) -> str:
    """A line of the table; a name of 300 letters is cut."""
    cells = (command.replace(STEPS, "..."), err.removeprefix("sqft: ").rstrip("\n"))
    typed, told = (cell.replace("x" * 300, "x...x").replace("|", "\\|") for cell in cells)
    return f"| `{typed}` | {code} | {told} |"


def main() -> None:
    """Prints docs/errors.md."""
    print(HEAD)
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work))
        os.chdir(work)
        for title, cases in CASES.items():
            print(f"\n## {title}\n\n| typed | exit code | said |\n|---|---|---|")
            for command, _, _ in cases:
                print(row(command, *said(command)))
        os.chdir("/")


if __name__ == "__main__":
    main()
