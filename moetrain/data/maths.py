"""Synthetic maths problems with worked steps: arithmetic, equations and word problems.

Document i is a function of (seed, i) alone. Every answer is exact; the last line of each document is `Answer: ...`.
"""

import math
import random
from collections.abc import Callable, Iterator

from moetrain.runtime import python_stream

_NAMES = ("Ada", "Ben", "Chen", "Dara", "Emil", "Fatou", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leila", "Mo")
_GOODS = ("apples", "pencils", "books", "tickets", "cups", "stamps", "lamps", "shirts", "bottles", "keys")
_VEHICLES = ("train", "bus", "cyclist", "ship", "van", "runner")


def maths_problems(*, seed: int, num_documents: int) -> Iterator[str]:
    """Yield `num_documents` problems, each with its question, its steps and its answer."""
    for index in range(num_documents):
        stream = python_stream(seed, "maths", index)
        yield stream.choice(_KINDS)(stream)


def _addition(stream: random.Random) -> str:
    a, b = (stream.randrange(10 ** stream.randint(1, 4), 10**5) for _ in range(2))
    lines = [f"Question: What is {a} + {b}?", "Add the digits from the right."]
    carry, place = 0, 1
    while place <= max(a, b):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        carry = total // 10
        lines.append(f"{x} + {y}{carried} = {total}: write {total % 10}, carry {carry}.")
        place *= 10
    if carry:
        lines.append(f"Write the last carry {carry}.")
    return _document(lines, a + b)


def _subtraction(stream: random.Random) -> str:
    a, b = sorted((stream.randrange(10, 10**4) for _ in range(2)), reverse=True)
    lines = [f"Question: What is {a} - {b}?"]
    rest = a
    place = 10 ** (len(str(b)) - 1)
    while place:
        part = b // place % 10 * place
        if part:
            lines.append(f"{rest} - {part} = {rest - part}.")
            rest -= part
        place //= 10
    return _document(lines, rest)


def _multiplication(stream: random.Random) -> str:
    a, b = stream.randrange(11, 1000), stream.randrange(11, 100)
    tens, ones = b // 10 * 10, b % 10
    lines = [
        f"Question: What is {a} * {b}?",
        f"Split {b} into {tens} and {ones}.",
        f"{a} * {tens} = {a * tens}.",
        f"{a} * {ones} = {a * ones}.",
        f"{a * tens} + {a * ones} = {a * b}.",
    ]
    return _document(lines, a * b)


def _division(stream: random.Random) -> str:
    divisor, number = stream.randrange(3, 30), stream.randrange(100, 5000)
    lines = [f"Question: Divide {number} by {divisor}. What are quotient and remainder?"]
    rest = 0
    for digit in str(number):
        rest = rest * 10 + int(digit)
        lines.append(f"Bring down {digit}: {rest} holds {divisor} {_times(rest // divisor)}, {rest % divisor} is left.")
        rest %= divisor
    return _document(lines, f"{number // divisor} remainder {rest}")


def _equation(stream: random.Random) -> str:
    a, x, b = stream.randrange(2, 20), stream.randrange(-30, 60), stream.randrange(1, 90)
    right = a * x + b
    lines = [
        f"Question: Solve {a}x + {b} = {right}.",
        f"Subtract {b} on both sides: {a}x = {right} - {b} = {right - b}.",
        f"Divide by {a}: x = {right - b} / {a} = {x}.",
    ]
    return _document(lines, f"x = {x}")


def _shopping(stream: random.Random) -> str:
    name, (goods, others) = stream.choice(_NAMES), stream.sample(_GOODS, 2)
    n, m, price, other_price = (stream.randrange(2, 25) for _ in range(4))
    cost = n * price + m * other_price
    paid = (cost // 50 + stream.randint(1, 3)) * 50
    lines = [
        f"Question: {name} buys {n} {goods} at {price} dollars each and {m} {others} at {other_price} dollars each, "
        f"and pays with {paid} dollars. How much change does {name} get?",
        f"The {goods} cost {n} * {price} = {n * price} dollars.",
        f"The {others} cost {m} * {other_price} = {m * other_price} dollars.",
        f"Together that is {n * price} + {m * other_price} = {cost} dollars.",
        f"The change is {paid} - {cost} = {paid - cost} dollars.",
    ]
    return _document(lines, f"{paid - cost} dollars")


def _journey(stream: random.Random) -> str:
    vehicle = stream.choice(_VEHICLES)
    speed, hours, more_hours = stream.randrange(2, 90), stream.randrange(2, 9), stream.randrange(1, 6)
    faster = speed + stream.randrange(1, 30)
    first, second = speed * hours, faster * more_hours
    lines = [
        f"Question: A {vehicle} travels {hours} hours at {speed} km per hour, then {_hours(more_hours)} at {faster} "
        "km per hour. How far does it travel?",
        f"The first part is {hours} * {speed} = {first} km.",
        f"The second part is {more_hours} * {faster} = {second} km.",
        f"In all it travels {first} + {second} = {first + second} km.",
    ]
    return _document(lines, f"{first + second} km")


def _percentage(stream: random.Random) -> str:
    percent, hundreds = stream.randrange(1, 20) * 5, stream.randrange(1, 60)
    whole = hundreds * 20
    part = whole * percent // 100
    goods = stream.choice(_GOODS)
    lines = [
        f"Question: A shop has {whole} {goods} and sells {percent} percent of them. How many are left?",
        f"{percent} percent of {whole} is {whole} * {percent} / 100 = {part}.",
        f"{whole} - {part} = {whole - part}.",
    ]
    return _document(lines, f"{whole - part} {goods}")


def _mean(stream: random.Random) -> str:
    count = stream.randrange(3, 7)
    numbers = [stream.randrange(1, 100) for _ in range(count - 1)]
    numbers.append(count * stream.randrange(60, 120) - sum(numbers))
    total = sum(numbers)
    lines = [
        f"Question: What is the mean of {', '.join(map(str, numbers))}?",
        f"The sum is {' + '.join(map(str, numbers))} = {total}.",
        f"There are {count} numbers, so the mean is {total} / {count} = {total // count}.",
    ]
    return _document(lines, total // count)


def _common_divisor(stream: random.Random) -> str:
    factor = stream.randrange(2, 30)
    a, b = sorted((factor * stream.randrange(5, 60), factor * stream.randrange(2, 40)), reverse=True)
    lines = [f"Question: What is the greatest common divisor of {a} and {b}?"]
    x, y = a, b
    while y:
        lines.append(f"{x} mod {y} = {x % y}.")
        x, y = y, x % y
    return _document(lines, math.gcd(a, b))


def _sequence(stream: random.Random) -> str:
    start, step, length = stream.randrange(1, 200), stream.randrange(2, 60), stream.randrange(4, 7)
    terms = [start + step * index for index in range(length)]
    lines = [
        f"Question: What comes next: {', '.join(map(str, terms))}?",
        f"{terms[1]} - {terms[0]} = {step} and {terms[2]} - {terms[1]} = {step}: each term is {step} more.",
        f"{terms[-1]} + {step} = {terms[-1] + step}.",
    ]
    return _document(lines, terms[-1] + step)


def _times(count: int) -> str:
    return "1 time" if count == 1 else f"{count} times"


def _hours(count: int) -> str:
    return "1 hour" if count == 1 else f"{count} hours"


def _document(lines: list[str], answer: int | str) -> str:
    return "\n".join([*lines, f"Answer: {answer}\n"])


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    *(_addition, _subtraction, _multiplication, _division, _equation, _shopping),
    *(_journey, _percentage, _mean, _common_divisor, _sequence),
)
