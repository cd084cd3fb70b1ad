"""Files, values and tensors changed at random, as ``fuzzing.py`` takes them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import torch

NUMBERS = ["1e999", "-1", "0", "9" * 5000, "9" * 30, ".inf", "nan", "NaN", "-Infinity", "0x" + "f" * 5000, "1:" * 50 + "1",
           "1e-400", "2147483648", "1000000000", "0.5", "1_0", "true", "null", '""', "[]", "{}"]  # fmt: skip
TEXTS = ["../../x", "/etc/passwd", "..", "a/../../b", "x" * 300, "\0", "\ud800", "\u2028", "é", "{{ 1 }}", "*a", "&a [*a]",
         "<<: *a", "!!python/object/apply:os.system ['touch /tmp/x']", "!!binary x", "? a", "- " * 40, "[" * 3000, "{a: " * 50,
         "2001-99-99", "#", "|", "\t", "---\na: 1", "%TAG ! x", "'", '"', "\\", "a\nb", "\x1b[2J", "file:///etc", "~"]  # fmt: skip
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", "x", [], {},
                     [[]], {"a": {}}, [1, "a"], *TEXTS]  # fmt: skip
TEMPLATES = ["{{ %s }}", "{%% for i in range(%s) %%}x{%% endfor %%}", "{{ 'a' * %s }}", "{{ q|center(%s) }}", "{{ 9 ** %s }}",
             "{%% macro m(n) %%}{{ m(n) }}{%% endmacro %%}{{ m(%s) }}", "{{ q|regex_replace('(a+)+$', '%s') }}", "{{ %s|e }}",
             "{%% set l = [0] %%}{%% for i in range(30) %%}{%% set _ = l.extend(l) %%}{%% endfor %%}%s", "{{ q[%s] }}",
             "{{ '%%%sd' %% 3 }}", "{{ ''.__class__.__mro__[%s] }}", "{%% for a in q %%}{%% for b in q %%}%s", "{{ lipsum(n=%s) }}",
             "{{ cycler(%s).next() }}", "{{ q.format(%s) }}", "{{ '{:%s}'.format(3) }}", "{%% include '%s' %%}"]  # fmt: skip
PARTS = [
    "1",
    "q",
    "10**9",
    "10**4",
    "'a'",
    "q|length",
    "((",
    "9",
    "-1",
    "none",
    "a.b.c",
    "[q] * 10**8",
    "1e400",
    "99999999999",
]


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """One to four places of a file changed."""
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        end = min(len(data), at + rng.choice([1, 2, 8, 64]))
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + data[at:end] * rng.randint(2, 50) + data[end:]
        elif kind == 3:
            data = data[:at]
        else:
            word = rng.choice(NUMBERS if kind == 4 else TEXTS).encode("utf-8", "surrogatepass")
            data = data[:at] + word + data[end if rng.random() < 0.5 else at :]
    return data


def value_of(rng: random.Random, value: Any) -> Any:
    """A copy of a tree of values with one to three of them changed, removed, added or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(rng.choice([key + "x", key[:-1], *TEXTS]))] = holder.pop(key)
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and type(holder[key]) in (int, float) and abs(holder[key]) < 1e300:
            holder[key] = holder[key] * rng.choice([-1, 0, 2, 10, 10**6, 10**12, 0.5])
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def tensors_of(rng: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with one or two changed in values, shape or kind, removed or renamed."""
    made = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(rng.randint(1, 2)):
        if not made:
            break
        name = rng.choice(sorted(made))
        kind, old = rng.randrange(7), made[name]
        if kind == 0:
            del made[name]
        elif kind == 1:
            made[name + rng.choice(["x", ".y", ""])] = made.pop(name)
        elif kind == 2:
            made[name] = old.to(
                rng.choice([torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool, torch.int8])
            )
        elif kind == 3:
            made[name] = torch.zeros([rng.randrange(5) for _ in range(rng.randrange(4))], dtype=old.dtype)
        elif kind == 4 and old.numel():
            old.view(-1)[rng.randrange(old.numel())] = rng.choice([1, 0, 127])
        elif kind == 5 and old.numel() and old.dtype in (torch.int32, torch.int64):
            old.view(-1)[rng.randrange(old.numel())] = rng.choice([-1, -(2**31), 2**31 - 1, 1000])
        else:
            made[name] = (
                old.flatten() if rng.random() < 0.5 else old[: rng.randrange(3)].contiguous() if old.ndim else old
            )
    return made
