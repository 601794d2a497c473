"""Files that are bad on purpose: one that was good, with something in it changed, drawn from a seed."""

import io
import json
import string
import struct
import zipfile

import torch

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
         "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
NUMBERS = [0, 1, -1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
           10**30, 10**400, 0.5, -0.0, 1e308]
SHAPES = [[], [0], [1], [16, 1], [1, 16], [0, 2**31], [0, 2**40], [2**40, 0], [0, 2**63], [2**62, 4], [2**32, 2**32],
          [-1], [-1, -1], [1.5], ["16"], [None], [0] * 70, [1] * 70, [[16]]]
TEXTS = ["", " ", "\0", "nan", "NaN", "inf", "1e999", "-1", "0", "1", "0x10", "1_0", "٣", "null", "true", "[]", "{}",
         '""', "7", "[" * 5000, '{"a":' * 900 + "1" + "}" * 900, "1" * 5000, "1" * 400, "a" * 70_000, "../../x",
         "/etc/x", "<mimi>", "<" + "m" * 5000 + ">", "<ミミ>", "𝕄\u202e", "\ud800", "\ufffe", "%s%n{0}", "<img src=x>",
         "perfusion-concept/1", "perfusion-concept/2", "perfusion-domain/1", "sdxl", "creature", "eps", "cat"]


def hostile(r, depth=0):
    """A value that nobody would put into JSON."""
    kind = r.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return r.choice(NUMBERS)
    if kind < 4:
        return r.choice(TEXTS)
    if kind < 6:
        return r.choice([None, True, False, float("nan"), float("inf"), float("-inf")])
    if kind == 6:
        return [hostile(r, depth + 1) for _ in range(r.randrange(4))]
    if kind == 7:
        return {r.choice(TEXTS[:20] + ["bias", "temperature", "steps", "far"]): hostile(r, depth + 1)
                for _ in range(r.randrange(4))}
    return [[r.choice([1, "a", None]), 0] for _ in range(r.randrange(4))]  # pairs, of which a dict can be made


# Our own files


def taken_apart(data: bytes):
    """Metadata, and [name, dtype, shape, bytes] of every tensor of a whole file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    facts = header.pop("__metadata__", {})
    rows = [[name, at["dtype"], at["shape"], data[end:][slice(*at["data_offsets"])]] for name, at in header.items()]
    return facts, rows


def put_together(facts, rows, change=lambda entries: entries) -> bytes:
    """The file again; `change` may spoil the pairs of its header."""
    entries, at = [("__metadata__", facts)], 0
    for name, dtype, shape, body in rows:
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(body)]}))
        at += len(body)
    pairs = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in change(entries))
    header = f"{{{pairs}}}".encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + b"".join(row[3] for row in rows)


def facts_changed(r, facts):
    """Another fact: its text, or one value in the JSON that it holds."""
    name = r.choice([*facts, "new", "format"])
    how = r.randrange(6)
    if how == 0:
        facts.pop(name, None)
    elif how == 1:
        facts[name] = hostile(r)  # no string at all
    elif how == 2 and facts.get(name, "")[:1] in ("{", "["):
        inner = json.loads(facts[name])
        if isinstance(inner, dict) and inner:
            inner[r.choice([*inner, "far", "pictures"])] = hostile(r)
        facts[name] = json.dumps(inner)
    elif how == 3:
        facts[name] = json.dumps(hostile(r))
    else:
        facts[name] = r.choice(TEXTS)


def row_changed(r, rows):
    """Another tensor, whose bytes agree with what its header says."""
    row = r.choice(rows)
    how = r.randrange(9)
    if how == 0:
        rows.remove(row)
    elif how == 1:
        rows.append([r.choice([row[0] + "x", "lora", "__class__", "target_output.", "tower.0.weight", "members.mean"]),
                     *row[1:]])
    elif how == 2:
        row[0] = r.choice([other[0] for other in rows] + TEXTS[:30])
    elif how == 3:  # as many numbers of another kind
        size = SIZES.get(row[1], 1)
        row[1] = r.choice(list(SIZES))
        row[3] = (row[3] * 8)[: len(row[3]) // size * SIZES[row[1]]]
    elif how == 4:  # more, fewer or none
        n = r.choice([0, 1, 2, 15, 17, 5000])
        row[2], row[3] = r.choice([[n], [1, n], [n, 1]]), r.randbytes(n * SIZES.get(row[1], 1))
    elif how == 5:  # no number of a tensor is left, whatever it says that it has
        row[2], row[3] = r.choice([s for s in SHAPES if 0 in s]), b""
    elif how == 6 and row[3]:  # a value that is none
        bad = r.choice([b"\x00\x7c", b"\x00\xfc", b"\x00\x7e", b"\xff\xff", b"\x00\x80", b"\x01\x00"])
        at = r.randrange(len(row[3])) // 2 * 2
        row[3] = (row[3][:at] + bad + row[3][at + 2 :])[: len(row[3])]
    elif how == 7:
        row[3] = bytes(len(row[3])) if r.random() < 0.5 else r.randbytes(len(row[3]))
    else:
        r.shuffle(rows)


def header_changed(r, entries):
    """Another header, which no longer agrees with what follows."""
    name, value = entries[k := r.randrange(len(entries))]
    how = r.randrange(8)
    if how == 0:
        entries.insert(r.randrange(len(entries)), (name, value))  # a key twice
    elif how == 1:
        entries[k] = (name, hostile(r))
    elif how == 2:
        entries[k] = (r.choice(TEXTS), value)
    elif how == 3 and "shape" in value:
        value["shape"] = r.choice(SHAPES)
    elif how == 4 and "dtype" in value:
        value["dtype"] = r.choice([*SIZES, "F4", "F6_E2M3", "F128", "f16", "", 3, None])
    elif how == 5 and "data_offsets" in value:
        value["data_offsets"] = [r.choice([*value["data_offsets"], *NUMBERS]) for _ in range(r.choice([2, 2, 2, 1, 3]))]
    elif how == 6:
        value[r.choice(["shape", "dtype", "data_offsets", "extra"])] = hostile(r)
    elif r.random() < 0.05:  # very many names
        n = r.choice([3000, 200_000])
        entries += [(f"t{k}", {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}) for k in range(n)]
    return entries


def bytes_changed(r, data: bytes, other: bytes) -> bytes:
    """Cut, flipped, put in twice, or with a part of another file; the first bytes more often."""
    at = r.randrange(len(data) if r.random() < 0.4 else min(len(data), 1200)) if data else 0
    long = r.choice([1, 1, 2, 8, 100, 3000])
    how = r.randrange(8)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + data[at + long :]
    if how == 2:
        return data[:at] + r.randbytes(long) + data[at:]
    if how == 3:
        return data[:at] + data[at : at + long] * 2 + data[at + long :]
    if how == 4:
        return data[:at] + other[at:]
    if how == 5:
        length = r.choice([0, 1, 2, len(data) - 8, len(data), 2**20, 2**27, 2**32, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", max(length, 0)) + data[8:]
    spoilt = bytearray(data)
    for _ in range(r.choice([1, 1, 3, 20])):
        if spoilt:
            k = r.randrange(len(spoilt)) if r.random() < 0.3 else r.randrange(min(len(spoilt), 1200))
            spoilt[k] = spoilt[k] ^ 1 << r.randrange(8) if how == 6 else r.randrange(256)
    return bytes(spoilt)


def file_changed(r, data: bytes, other: bytes) -> bytes:
    """A .safetensors file with one to four changes, of what it says or of its bytes."""
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        try:
            facts, rows = taken_apart(data)
            said = [*facts.values(), *(dtype for _, dtype, _, _ in rows)]
            whole = facts and rows and all(isinstance(fact, str) for fact in said)
        except Exception:  # no longer a file that can be taken apart
            whole = False
        how = r.random() if whole else 1
        if how < 0.3:
            facts_changed(r, facts)
            data = put_together(facts, rows)
        elif how < 0.6:
            row_changed(r, rows)
            data = put_together(facts, rows)
        elif how < 0.8:
            data = put_together(facts, rows, lambda entries: header_changed(r, entries))
        else:
            data = bytes_changed(r, data, other)
    return data


def text_changed(r, text: str) -> str:
    """Base64 with something else in it."""
    at, how = r.randrange(len(text) + 1), r.randrange(7)
    if how == 0:
        return text[:at]
    if how == 1:
        return text[:at] + r.choice(["=", "==", "\n", " ", "-", "_", "\0", "é", "猫", "\ud800", "%2B"]) + text[at:]
    if how == 2:
        return text[:at] + "".join(r.choices(string.printable, k=r.choice([1, 4, 100]))) + text[at:]
    if how == 3:
        return text[at:] + text[:at]
    if how == 4:
        return text * r.choice([2, 3, 400])
    if how == 5:
        return r.choice(TEXTS)
    return text[:at] + "".join(r.choices(string.ascii_letters + string.digits + "+/", k=4)) + text[at + 4 :]


# Archives of torch.save


def bomb(depth=40, kind=list):
    """So small a pickle, and so long a text when it is written out."""
    found = kind(["x"])
    for _ in range(depth):
        found = kind([found, found])
    return found


def strange(r):
    """A value in the place of a tensor or a setting."""
    one = torch.ones(1)
    return r.choice([
        lambda: hostile(r), lambda: bomb(), lambda: one.expand(2**40), lambda: one.expand(768, 2**30)[:, 0],
        lambda: torch.zeros(2**40, 0), lambda: torch.zeros(0), lambda: torch.zeros(0, 768), lambda: torch.tensor(1.0),
        lambda: torch.full((768,), float("nan")), lambda: torch.full((1, 768), float("inf")), lambda: torch.zeros(768),
        lambda: torch.ones(768, 768), lambda: torch.ones(1, 768, dtype=torch.int64), lambda: torch.ones(77, 320).bool(),
        lambda: torch.ones(768, dtype=torch.complex64).imag, lambda: torch.eye(768).to_sparse(),
        lambda: one._neg_view(),
        lambda: torch.ones(1, 768, requires_grad=True), lambda: torch.nn.Parameter(torch.ones(768)), lambda: {1: one},
        lambda: {"*": one}, lambda: [[one, one]], lambda: [one.expand(1, 768), one.expand(1, 320)], lambda: b"bytes",
        lambda: 3 + 4j, lambda: torch.float32, lambda: torch.Size([1]), lambda: {"a", 1}, lambda: torch.device("cpu"),
        lambda: torch.ones(1, 768).T, lambda: torch.ones(768).flip(0).expand(768, 768), lambda: torch.ones(3).double(),
    ])()


def state_changed(r, state):
    """A copy of nested dicts and lists with one value in it replaced, renamed or gone."""
    if isinstance(state, torch.nn.ParameterDict):
        return strange(r) if r.random() < 0.5 else torch.nn.ParameterDict({"*": torch.ones(1), "b": torch.ones(2)})
    if not isinstance(state, (dict, list, tuple)) or not len(state) or r.random() < 0.1:
        return strange(r)
    pairs = list(state.items()) if isinstance(state, dict) else list(enumerate(state))
    key, value = pairs[k := r.randrange(len(pairs))]
    how = r.random()
    if how < 0.1:
        del pairs[k]
    elif how < 0.15:
        pairs.append(("more" if isinstance(state, dict) else 0, strange(r)))
    elif how < 0.2:
        pairs[k] = (r.choice(["x" * 10_000, 7, None, bomb(8, tuple), "\0", "é"]), value)
    else:
        pairs[k] = (key, state_changed(r, value))
    return dict(pairs) if isinstance(state, dict) else type(state)(v for _, v in pairs)


def saved(state) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def archive(entries, compression=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as made:
        for name, data in entries:
            made.writestr(name, data)
    return out.getvalue()


def entries_of(data: bytes) -> list:
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        return [(name, held.read(name)) for name in held.namelist()]


def commands(canary: str) -> list[bytes]:
    """Opcodes that would leave a file there, were they obeyed, and each leaves one value on the stack."""
    touch = f"touch {canary}".encode()
    short = struct.pack("<B", len(touch)) + touch
    code = f"open({canary!r}, 'w')".encode()

    def word(text):
        return b"\x8c" + struct.pack("<B", len(text)) + text

    return [
        b"cos\nsystem\n(U" + short + b"tR", b"cposix\nsystem\n(U" + short + b"tR",
        word(b"os") + word(b"system") + b"\x93(U" + short + b"tR", b"(U" + short + b"ios\nsystem\n",
        b"cbuiltins\neval\n(U" + struct.pack("<B", len(code)) + code + b"tR",
        b"c__builtin__\nexec\n(U" + struct.pack("<B", len(code)) + code + b"tR",
        b"csubprocess\nPopen\n((U\x05touchU" + struct.pack("<B", len(canary)) + canary.encode() + b"ltR",
        b"cpathlib\nPath\n(U" + struct.pack("<B", len(canary)) + canary.encode() + b"tR",
        b"ctorch\nload\n(U" + struct.pack("<B", len(canary)) + canary.encode() + b"tR",
        b"cbuiltins\ngetattr\n(cos\nU\x06systemtR", b"ccollections\nOrderedDict\n(cos\nsystem\ntR",
        b"comegaconf.x\nsystem\n(U" + short + b"tR", b"comegaconf\n__reduce__\n(U" + short + b"tR",
        b"ctyping\nAny\n(U" + short + b"tR", b"\x82\x01", b"(U" + short + b"cos\nsystem\no",
    ]


def archive_changed(r, data: bytes, canary: str) -> bytes:
    """An archive with another pickle, other records, or other bytes."""
    entries = entries_of(data)
    k = next(k for k, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    name, pickle = entries[k]
    how = r.randrange(8)
    if how < 3:
        order = r.choice(commands(canary))
        at = r.choice([2, len(pickle) - 1, r.randrange(2, len(pickle))])
        pickle = pickle[:at] + order + r.choice([b"0", b""]) + pickle[at:]
    elif how < 5:
        pickle = bytes_changed(r, pickle, bytes(reversed(pickle)))
    elif how == 5:
        entries.pop(r.randrange(len(entries)))
        return archive(entries)
    elif how == 6:
        j = r.randrange(len(entries))
        old = entries[j][0]
        entries[j] = (r.choice([old + "x", "../" + old, entries[0][0], "é", "/etc/x"]), entries[j][1])
        return archive(entries, r.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    else:
        return bytes_changed(r, data, bytes(len(data))) if r.random() < 0.5 else data[: r.randrange(len(data))]
    entries[k] = (name, pickle)
    return archive(entries)
