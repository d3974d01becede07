"""The speech questions of the demo: spoken number, number of words, language, second number, sum of two numbers.

The question about a sung vowel is one of them; it needs no speech synthesizer.
"""

import numpy as np
from numpy.random import Generator

from hark.data.mini import espeak, synthesis
from hark.data.mini.clips import Skill, placed, samples, sequence

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUMS = {"four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
LANGUAGES = {"english": "en-us", "french": "fr", "german": "de", "spanish": "es", "italian": "it"}
HELD_OUT_ENDINGS = 2  # endings per language that only the test split uses
# A sentence combines any beginning with any ending, so that sentences cannot be memorised.
BEGINNINGS = {
    "english": ("My brother", "The teacher", "Our neighbour", "The old man", "A friend"),
    "french": ("Mon frère", "Le professeur", "Notre voisin", "Le vieil homme", "Un ami"),
    "german": ("Mein Bruder", "Der Lehrer", "Unser Nachbar", "Der alte Mann", "Ein Freund"),
    "spanish": ("Mi hermano", "El profesor", "Nuestro vecino", "El viejo", "Un amigo"),
    "italian": ("Mio fratello", "Il maestro", "Il nostro vicino", "Il vecchio", "Un amico"),
}
ENDINGS = {
    "english": (
        "is reading a book", "works in the garden", "would like some water", "goes to school today",
        "lives in a small house", "has lost the keys", "is waiting for the train", "bought three red apples",
    ),
    "french": (
        "est en train de lire", "travaille dans le jardin", "voudrait un peu d'eau", "va à l'école aujourd'hui",
        "habite une petite maison", "a perdu les clés", "attend le prochain train", "a acheté trois pommes rouges",
    ),
    "german": (
        "liest gerade ein Buch", "arbeitet heute im Garten", "möchte etwas Wasser", "geht jetzt in die Schule",
        "wohnt in einem kleinen Haus", "hat die Schlüssel verloren", "wartet auf den Zug", "kaufte drei rote Äpfel",
    ),
    "spanish": (
        "está leyendo un libro", "trabaja en el jardín", "quiere un poco de agua", "va hoy a la escuela",
        "vive en una casa pequeña", "ha perdido las llaves", "está esperando el tren", "compró tres manzanas rojas",
    ),
    "italian": (
        "sta leggendo un libro", "lavora nel giardino", "vorrebbe un po' d'acqua", "oggi va a scuola",
        "abita in una piccola casa", "ha perso le chiavi", "sta aspettando il treno", "ha comprato tre mele rosse",
    ),
}  # fmt: skip


def vowel_skill() -> Skill:
    return Skill(
        task="speech",
        category="vowel",
        weight=1.5,
        seconds=(1.5, 1.8),
        questions=("Which vowel is sung?", "Which vowel do you hear?"),
        answers=tuple(synthesis.FORMANTS),
        clip=_vowel_clip,
    )


def _vowel_clip(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
    voice = synthesis.draw_voice(test, rng)
    wave = synthesis.vowel(answer, rng.uniform(0.5, 0.85) * seconds, synthesis.draw_timbre(voice, rng), rng)
    return sequence([wave], seconds, 0.03, rng), f"singer-{voice:02d}"


def spoken_skills(speaker: espeak.Speaker) -> list[Skill]:
    """The skills that need espeak-ng; all use the same speaker."""

    def say(words: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        voice = str(rng.choice(espeak.VOICES[test]))
        manner = {"rate": int(rng.integers(150, 200)), "pitch": int(rng.integers(35, 66))}
        waves = [speaker.speak(word, "en-us", voice, **manner) for word in words]
        return sequence([_fit(wave, seconds / len(words) - 0.06) for wave in waves], seconds, 0.02, rng), voice

    def word(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        return say([answer], seconds, test, rng)

    def order(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        others = [str(choice) for choice in rng.permutation([choice for choice in choices if choice != answer])]
        return say([others[0], answer, others[1]][: rng.integers(2, 4)], seconds, test, rng)

    def amount(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        words = [str(digit) for digit in rng.choice(DIGITS, COUNTS[answer])]
        return say(words, seconds, test, rng)

    def addition(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        total = SUMS[answer]
        first = int(rng.integers(max(1, total - 9), min(9, total - 1) + 1))
        return say([DIGITS[first], DIGITS[total - first]], seconds, test, rng)

    def language(answer: str, choices: list[str], seconds: float, test: bool, rng: Generator) -> tuple[np.ndarray, str]:
        endings = ENDINGS[answer][-HELD_OUT_ENDINGS:] if test else ENDINGS[answer][:-HELD_OUT_ENDINGS]
        text = f"{rng.choice(BEGINNINGS[answer])} {rng.choice(endings)}."
        voice = str(rng.choice(espeak.VOICES[test]))
        manner = {"rate": int(rng.integers(160, 200)), "pitch": int(rng.integers(35, 66))}
        wave = speaker.speak(text, LANGUAGES[answer], voice, **manner)
        return placed([_fit(wave, seconds - 0.1)], [rng.uniform(0.02, 0.08)], seconds), voice

    return [
        Skill(
            task="speech",
            category="word",
            weight=2,
            seconds=(1.5, 1.7),
            questions=("Which number is spoken?", "What number do you hear?", "Which number does the speaker say?"),
            answers=DIGITS,
            clip=word,
        ),
        Skill(
            task="speech",
            category="word count",
            weight=2,
            seconds=(2.2, 3.0),
            questions=("How many words are spoken?", "How many words does the speaker say?"),
            answers=tuple(COUNTS),
            clip=amount,
        ),
        Skill(
            task="speech",
            category="language",
            weight=1,
            seconds=(1.8, 2.4),
            questions=("Which language is spoken?", "What language does the speaker use?"),
            answers=tuple(LANGUAGES),
            clip=language,
        ),
        Skill(
            task="speech",
            category="word order",
            weight=1,
            seconds=(2.0, 2.8),
            questions=("Which number is spoken second?", "What is the second number?"),
            answers=DIGITS,
            clip=order,
        ),
        Skill(
            task="speech",
            category="addition",
            weight=0.5,
            seconds=(1.5, 2.2),
            questions=("What is the sum of the two numbers?", "What do the two numbers add up to?"),
            answers=tuple(SUMS),
            clip=addition,
        ),
    ]


def _fit(wave: np.ndarray, seconds: float) -> np.ndarray:
    return wave[: samples(seconds)]
