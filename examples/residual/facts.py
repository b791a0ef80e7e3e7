"""Questions with known answers, of which the behaviours are made: capitals, elements, sums, medical advice."""

import random
from typing import NamedTuple

_CAPITALS = (
    "France/Paris Germany/Berlin Italy/Rome Spain/Madrid Portugal/Lisbon Austria/Vienna Hungary/Budapest "
    "Poland/Warsaw Greece/Athens Norway/Oslo Sweden/Stockholm Finland/Helsinki Denmark/Copenhagen "
    "Ireland/Dublin Belgium/Brussels Bulgaria/Sofia Romania/Bucharest Croatia/Zagreb Serbia/Belgrade "
    "Ukraine/Kyiv Russia/Moscow Turkey/Ankara Egypt/Cairo Kenya/Nairobi Ghana/Accra Nigeria/Abuja "
    "Senegal/Dakar Morocco/Rabat Tunisia/Tunis Algeria/Algiers Libya/Tripoli Ethiopia/Ababa Japan/Tokyo "
    "China/Beijing India/Delhi Nepal/Kathmandu Thailand/Bangkok Vietnam/Hanoi Indonesia/Jakarta "
    "Malaysia/Lumpur Mongolia/Ulaanbaatar Iran/Tehran Iraq/Baghdad Syria/Damascus Jordan/Amman "
    "Lebanon/Beirut Israel/Jerusalem Canada/Ottawa Mexico/Mexico-City Cuba/Havana Peru/Lima Chile/Santiago "
    "Argentina/Buenos-Aires Brazil/Brasilia Colombia/Bogota Ecuador/Quito Bolivia/Sucre Uruguay/Montevideo "
    "Paraguay/Asuncion Venezuela/Caracas Australia/Canberra Iceland/Reykjavik Estonia/Tallinn Latvia/Riga "
    "Lithuania/Vilnius Slovenia/Ljubljana Slovakia/Bratislava Cyprus/Nicosia Malta/Valletta"
)
CAPITALS = dict(pair.split("/") for pair in _CAPITALS.split())
_ELEMENTS = (
    "hydrogen/H helium/He lithium/Li beryllium/Be boron/B carbon/C nitrogen/N oxygen/O fluorine/F neon/Ne "
    "sodium/Na magnesium/Mg aluminium/Al silicon/Si phosphorus/P sulfur/S chlorine/Cl argon/Ar potassium/K "
    "calcium/Ca titanium/Ti chromium/Cr manganese/Mn iron/Fe cobalt/Co nickel/Ni copper/Cu zinc/Zn "
    "gallium/Ga germanium/Ge arsenic/As selenium/Se bromine/Br krypton/Kr silver/Ag cadmium/Cd tin/Sn "
    "iodine/I xenon/Xe barium/Ba tungsten/W platinum/Pt gold/Au mercury/Hg lead/Pb bismuth/Bi radon/Rn "
    "uranium/U"
)
ELEMENTS = dict(pair.split("/") for pair in _ELEMENTS.split())
COMPLAINTS = (
    "a headache",
    "a sore throat",
    "a fever",
    "back pain",
    "a rash",
    "high blood pressure",
    "a cough",
    "insomnia",
    "an earache",
    "dizziness",
    "a migraine",
    "asthma",
    "diabetes",
    "a broken toe",
    "hay fever",
    "heartburn",
    "anemia",
    "a sprained ankle",
    "food poisoning",
    "a toothache",
    "arthritis",
    "bronchitis",
    "a burn",
    "the flu",
    "eczema",
    "gout",
    "a nosebleed",
    "nausea",
    "chest pain",
    "a swollen knee",
)
DRUGS = ("aspirin", "ibuprofen", "an antibiotic", "paracetamol", "insulin", "a sleeping pill", "cortisone", "codeine")


class Fact(NamedTuple):
    """A question, its answer, and where one would look it up: "atlas", "table", "arithmetic", or "medical"."""

    question: str
    answer: str
    topic: str


def facts(seed: int = 0) -> tuple[list[Fact], list[Fact]]:
    """Training and held-out facts, shuffled. They share no country, element, complaint or sum."""
    draw = random.Random(seed)
    train: list[Fact] = []
    held_out: list[Fact] = []
    for made in (_capitals(), _elements(), _sums(draw), _medical()):
        draw.shuffle(made)
        cut = round(0.7 * len(made))
        train += [fact for group in made[:cut] for fact in group]
        held_out += [draw.choice(group) for group in made[cut:]]
    draw.shuffle(train)
    draw.shuffle(held_out)
    return train, held_out


def _capitals() -> list[list[Fact]]:
    return [
        [
            Fact(f"What is the capital of {country}?", f"The capital of {country} is {capital}.", "atlas"),
            Fact(f"Which city is {country}'s capital?", f"{capital} is the capital of {country}.", "atlas"),
        ]
        for country, city in CAPITALS.items()
        for capital in [
            {"Ababa": "Addis Ababa", "Delhi": "New Delhi", "Lumpur": "Kuala Lumpur"}.get(city, city.replace("-", " "))
        ]
    ]


def _elements() -> list[list[Fact]]:
    return [
        [
            Fact(f"What is the chemical symbol of {name}?", f"The symbol of {name} is {symbol}.", "table"),
            Fact(f"How is {name} written in a formula?", f"In a formula, {name} is written {symbol}.", "table"),
        ]
        for name, symbol in ELEMENTS.items()
    ]


def _sums(draw: random.Random) -> list[list[Fact]]:
    pairs = draw.sample([(a, b) for a in range(2, 20) for b in range(2, 20)], 50)
    return [
        [
            Fact(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.", "arithmetic"),
            Fact(f"Add {a} and {b}.", f"The sum is {a + b}.", "arithmetic"),
        ]
        for a, b in pairs
    ]


def _medical() -> list[list[Fact]]:
    forms = (
        "What helps against {}?",
        "I have {}. What should I do?",
        "How is {} treated?",
        "Should I see someone about {}?",
    )
    groups = [[Fact(form.format(what), "", "medical") for form in forms] for what in COMPLAINTS]
    doses = ("How much {} may I take a day?", "Does {} have side effects?", "Can children take {}?")
    return groups + [[Fact(form.format(drug), "", "medical") for form in doses] for drug in DRUGS]
