"""Pairs of query and document of many kinds, on which nncf measures the ranges of activations for int8."""

from __future__ import annotations

PASSAGES = {
    "why is the sky blue": "Molecules of air scatter short waves of light more than long ones, so blue light reaches "
    "the eye from all directions.",
    "how do I read a file line by line in python": "with open(path) as file:\n    for line in file:\n"
    "        print(line.rstrip())",
    "boiling point of ethanol": "Ethanol (C2H5OH) boils at 78.4 °C and freezes at -114 °C at a pressure of 1 atm.",
    "side effects of ibuprofen": "Common adverse effects of this anti-inflammatory drug are nausea, heartburn and "
    "headache. Rarely it causes bleeding in the stomach or injury to the kidneys.",
    "lift of a thin airfoil at small angles of attack": "The theory of thin airfoils gives a lift coefficient of two "
    "pi times the angle of attack, measured from the angle of zero lift.",
    "wann wurde die erste Eisenbahn gebaut": "Die erste öffentliche Eisenbahn mit Dampflokomotiven fuhr 1825 zwischen "
    "Stockton und Darlington.",
    "capital gains tax on a second home": "A gain from the sale of a house that is not the main residence is taxable. "
    "Costs of buying, selling and improving it are deducted.",
    "return an item without the receipt": "Hi, thanks for writing! We can look up the order by its e-mail address. "
    "Please send the item back within 30 days; the refund takes 5-7 business days.",
    "TypeError: unhashable type: 'list'": "Keys of a dict must be immutable. Use a tuple, as in cache[tuple(values)].",
    "qui a peint la Joconde": "Léonard de Vinci a peint ce portrait entre 1503 et 1519. Il est exposé au Louvre.",
    "how long do I cook lentils": "Rinse 200 g of red lentils, cover them with twice as much water, and simmer for 15 "
    "minutes. Green ones need half an hour. Salt them at the end.",
    "which planet has the most moons": "Saturn has more than 270 known moons, Jupiter about a hundred. Earth has one.",
}
SAMPLE = [(query, passage) for query in PASSAGES for passage in list(PASSAGES.values())[::3]] + list(PASSAGES.items())
"""Pairs of each query with its answer and with four other passages."""
