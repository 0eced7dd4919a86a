"""OpenQASM text, version 2 or 3, as a circuit: registers, gates with names, definitions of gates, measurements."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensortrain.errors import DataError
from tensortrain.models.quantum.circuit import Circuit
from tensortrain.models.quantum.gates import GATES, Operation

__all__ = ["from_qasm"]

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PIECE = re.compile(r"gate\b[^{;]*\{[^}]*\}|[^;{}]+;|\S", re.DOTALL)
_REGISTER = re.compile(r"(qreg|creg)\s+(\w+)\s*\[\s*(\d+)\s*\]|(qubit|bit)\s*(?:\[\s*(\d+)\s*\])?\s*(\w+)")
_DEFINITION = re.compile(r"gate\s+(\w+)\s*(?:\(([^)]*)\))?\s*([\w\s,]+?)\s*\{(.*)\}", re.DOTALL)
_CALL = re.compile(r"(\w+)\s*(?:\((.*)\))?\s*((?:\w+(?:\s*\[\s*\d+\s*\])?\s*,\s*)*\w+(?:\s*\[\s*\d+\s*\])?)", re.DOTALL)
_PLACE = re.compile(r"(\w+)\s*(?:\[\s*(\d+)\s*\])?")
_PHASE = re.compile(r"gphase\s*\([^;]*\)")
_NUMBER = re.compile(r"\s*-?\d+(\.\d*)?(e[-+]?\d{1,2})?\s*")  # which float reads faster than a parser
_MEASURED = re.compile(r"(bit\b.*?(\w+))\s*=\s*(measure\b.+)", re.DOTALL)
# Of the standard file of version 2: controlled nots up to phases, which take fewer gates.
_STANDARD = (
    "gate rccx a, b, c { h c; t c; cx b, c; tdg c; cx a, c; t c; cx b, c; tdg c; h c; }",
    "gate rc3x a, b, c, d { h d; t d; cx c, d; tdg d; h d; cx a, d; t d; cx b, d; tdg d; cx a, d; t d; cx b, d; tdg d; "
    "h d; t d; cx c, d; tdg d; h d; }",
)
_MOST_EXPANDED = 10_000_000  # operations; definitions that call each other may ask for any number

_CONSTANTS = {"pi": math.pi, "π": math.pi, "tau": math.tau, "τ": math.tau, "euler": math.e, "ℇ": math.e}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    name: getattr(math, name) for name in ("sin", "cos", "tan", "exp", "sqrt", "asin", "acos", "atan")
} | {"ln": math.log, "log": math.log, "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan}
_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def from_qasm(text: str) -> Circuit:
    """Read a program in OpenQASM 2 or 3.

    Known are registers of qubits and bits, the gates of the standard files and a few more, definitions of gates,
    ``measure``, ``reset``, ``barrier``, angles as expressions, and calls on whole registers. Registers are laid one
    after the other; phases of the whole state are left out. Conditions, loops, modifiers and pulses are not known.

    Args:
        text: The program.

    Returns:
        Circuit: With ``fidelity`` None.

    Raises:
        DataError: A statement is not known, or does not fit; it names the line.

    Example:
        >>> tensortrain.quantum.from_qasm("OPENQASM 3.0; qubit[2] q; bit[2] c; h q[0]; c = measure q;").n_bits
        2
    """
    if not isinstance(text, str):
        raise DataError(f"a program must be text: it has {type(text).__name__}, expected a str. Read the file first.")
    reader = _Reader()
    plain = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text.removeprefix("\ufeff"))
    line, upto = 1, 0
    for piece in _PIECE.finditer(plain):
        start = piece.end() - len(piece[0].lstrip())
        line, upto = line + plain.count("\n", upto, start), start
        reader.read(piece[0].strip(), line)
    if not reader.qubits.size:
        raise DataError("a circuit must have qubits: the program declares none. Add qreg q[2]; or qubit[2] q;.")
    return Circuit(reader.qubits.size, tuple(reader.operations), reader.bits.size)


@dataclass
class _Registers:
    """Places by name, numbered one register after the other."""

    kind: str
    spans: dict[str, range] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, size: int) -> None:
        self.spans[name] = range(self.size, self.size + size)
        self.size += size

    def places(self, text: str) -> tuple[Sequence[int], bool]:
        """The places that ``q`` or ``q[3]`` names, and whether it is a whole register."""
        found = _PLACE.fullmatch(text.strip())
        if found is None or found[1] not in self.spans:
            raise _Unknown(f"{text.strip()!r} is none of the declared {self.kind}s", f"one of {sorted(self.spans)}")
        span = self.spans[found[1]]
        if found[2] is None:
            return span, True
        if int(found[2]) >= len(span):
            raise _Unknown(f"{text.strip()!r} lies outside its register", f"0 to {len(span) - 1}")
        return [span[int(found[2])]], False


class _Unknown(Exception):
    """What is wrong, and what would be right; the reader adds the line."""


@dataclass(frozen=True)
class _Definition:
    params: tuple[str, ...]
    qubits: tuple[str, ...]
    body: tuple[str, ...]


class _Reader:
    """Statements one by one."""

    def __init__(self) -> None:
        self.qubits, self.bits = _Registers("qubit"), _Registers("bit")
        self.operations: list[Operation] = []
        self.definitions: dict[str, _Definition] = {}
        for text in _STANDARD:
            self._define(text)

    def read(self, statement: str, line: int) -> None:
        try:
            self._read(statement.rstrip(";").strip() if not statement.endswith("}") else statement, statement)
        except _Unknown as error:
            found, expected = error.args
            shown = " ".join(statement.split())
            raise DataError(
                f"a program must be understood: line {line}, {shown[:80]!r}: {found}, expected {expected}. Known are "
                "registers, gates with names, definitions of gates, measure, reset, barrier."
            ) from None

    def _read(self, words: str, statement: str) -> None:
        if not words or words.startswith(("include", "opaque ")):  # what is opaque has no gates, and may not be called
            return
        if re.fullmatch(_PHASE, words):  # of the whole state: it changes no outcome
            return
        if not statement.endswith((";", "}")):
            raise _Unknown("a statement has no end", "a semicolon")
        keyword = re.split(r"[\s(\[]", words, maxsplit=1)[0]
        if keyword == "OPENQASM":
            self._check_version(words)
        elif found := _MEASURED.fullmatch(words):
            self._declare(found[1])
            self._measure(f"{found[2]} = {found[3]}")
        elif keyword in ("qreg", "creg", "qubit", "bit"):
            self._declare(words)
        elif keyword == "gate":
            self._define(words)
        elif "measure" in words:
            self._measure(words)
        elif keyword in ("reset", "barrier"):
            self._plain(keyword, words)
        else:
            for operation in self._called(words):
                self._put(operation)

    def _check_version(self, words: str) -> None:
        if not re.fullmatch(r"OPENQASM\s+[23](\.\d+)?", words):
            raise _Unknown("this version is not known", "OPENQASM 2.0 or 3.0")

    def _declare(self, words: str) -> None:
        found = _REGISTER.fullmatch(words)
        if found is None:
            raise _Unknown("this declaration is not known", "such as qreg q[4]; or qubit[4] q;")
        kind, name = (found[1], found[2]) if found[1] else (found[4], found[6])
        size = int(found[3]) if found[1] else int(found[5] or 1)
        if name in self.qubits.spans or name in self.bits.spans:
            raise _Unknown(f"{name!r} is declared already", "another name")
        (self.qubits if kind in ("qreg", "qubit") else self.bits).add(name, size)

    def _define(self, words: str) -> None:
        found = _DEFINITION.fullmatch(words)
        if found is None:
            raise _Unknown("this definition is not known", "such as gate name(angle) a, b { cx a, b; }")
        params, qubits = (_names(part or "") for part in (found[2], found[3]))
        body = tuple(part.strip() for part in found[4].split(";") if part.strip())
        self.definitions[found[1]] = _Definition(params, qubits, body)

    def _measure(self, words: str) -> None:
        arrow = re.fullmatch(r"measure\s+(.+?)\s*->\s*(.+)", words, re.DOTALL)
        assigned = re.fullmatch(r"([^=]+?)\s*=\s*measure\s+(.+)", words, re.DOTALL)
        if arrow is None and assigned is None:
            raise _Unknown("this measurement is not known", "measure q -> c; or c = measure q;")
        source, target = (arrow[1], arrow[2]) if arrow else (assigned[2], assigned[1])  # type: ignore[index]
        qubits, bits = self.qubits.places(source)[0], self.bits.places(target)[0]
        if len(qubits) != len(bits):
            raise _Unknown(f"{len(qubits)} qubits meet {len(bits)} bits", "as many")
        for q, c in zip(qubits, bits, strict=True):
            self._put(Operation("measure", (q,), (), c))

    def _plain(self, name: str, words: str) -> None:
        rest = words[len(name) :].strip()
        texts = rest.split(",") if rest else list(self.qubits.spans)
        places = [q for text in texts for q in self.qubits.places(text)[0]]
        if name == "barrier":
            self._put(Operation(name, tuple(places)))
            return
        for q in places:
            self._put(Operation(name, (q,)))

    def _called(self, words: str) -> Iterator[Operation]:
        """A gate, once or for every qubit of the registers that it is called on."""
        name, angles, texts = _taken_apart(words)
        found = [self.qubits.places(text) for text in texts]
        lengths = {len(places) for places, is_register in found if is_register}
        if len(lengths) > 1:
            raise _Unknown(f"registers have {sorted(lengths)} qubits", "one number")
        for k in range(lengths.pop() if lengths else 1):
            qubits = tuple(places[k] if is_register else places[0] for places, is_register in found)
            yield from self._gate(name, [_value(angle, {}) for angle in angles], qubits, 0)

    def _gate(self, name: str, angles: Sequence[float], qubits: tuple[int, ...], level: int) -> Iterator[Operation]:
        defined, named = self.definitions.get(name), GATES.get(name)
        if defined is None and named is None:
            raise _Unknown(f"there is no gate {name!r}", f"a definition, or one of {', '.join(sorted(GATES))}")
        n_params = len(defined.params) if defined else named.n_params  # type: ignore[union-attr]
        n_qubits = len(defined.qubits) if defined else named.n_qubits  # type: ignore[union-attr]
        if (len(angles), len(qubits)) != (n_params, n_qubits) or len(set(qubits)) < len(qubits):
            raise _Unknown(
                f"{name!r} has {len(angles)} angles and qubits {list(qubits)}",
                f"{n_params} angles and {n_qubits} different qubits",
            )
        if defined is None:
            yield Operation(name, qubits, tuple(angles))
            return
        if level > 50:
            raise _Unknown(f"{name!r} calls itself", "gates that are defined before")
        values, places = dict(zip(defined.params, angles, strict=True)), dict(zip(defined.qubits, qubits, strict=True))
        for words in defined.body:
            if words.startswith("barrier") or re.fullmatch(_PHASE, words):
                continue
            inner, inner_angles, texts = _taken_apart(words)
            if unknown := [text for text in texts if text not in places]:
                raise _Unknown(f"the gate {name!r} uses {unknown[0]!r}", f"one of {list(places)}")
            inner_values = [_value(angle, values) for angle in inner_angles]
            yield from self._gate(inner, inner_values, tuple(places[text] for text in texts), level + 1)

    def _put(self, operation: Operation) -> None:
        if len(self.operations) >= _MOST_EXPANDED:
            raise _Unknown("the program is too long", f"at most {_MOST_EXPANDED} operations")
        self.operations.append(operation)


def _taken_apart(words: str) -> tuple[str, list[str], list[str]]:
    """Name, angles and places of a call."""
    found = _CALL.fullmatch(words)
    keyword = re.split(r"\W", words, maxsplit=1)[0]
    if found is None or keyword in ("if", "for", "while", "ctrl", "negctrl", "inv", "pow", "opaque", "def", "let"):
        raise _Unknown("this statement is not known", "a gate on qubits, such as rz(pi/2) q[0];")
    return found[1], _at_commas(found[2] or ""), [text.strip() for text in found[3].split(",")]


def _at_commas(text: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _value(text: str, names: Mapping[str, float]) -> float:
    """An angle: numbers, pi, names of parameters, operators, and a few functions."""
    if _NUMBER.fullmatch(text):
        return float(text)

    def of(node: Any) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return float(node.value)
        if isinstance(node, ast.Name) and node.id in known:
            return known[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](of(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
            return _FUNCTIONS[node.func.id](of(node.args[0]))
        raise ValueError

    known = {**_CONSTANTS, **names}
    try:
        found = of(ast.parse(text.strip().replace("^", "**"), mode="eval").body)
        if isinstance(found, float) and math.isfinite(found):
            return found
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError):
        pass
    raise _Unknown(f"the angle {text.strip()!r} is no number", "numbers, pi, + - * / ^ and functions of them")
