"""A small made-up download in the format of MovieLens 1M, whose profile, clicks and stars are correlated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

AGES = (1, 18, 25, 35, 45, 50, 56)
OCCUPATIONS = (0, 4, 7, 12)


def write_movielens_1m(
    folder: Path, users: int = 80, movies: int = 60, ratings: tuple[int, int] = (15, 40), seed: int = 0
) -> Path:
    """Write `ratings.dat` and `users.dat`.

    Movies belong to four genres, one for each gender below and above 35 years. Most movies that a user rates are of the genre
    of the own profile, one after the other in the genre's order, so that the next movie, the starred movies and the profile
    can be learned from the sequence. Stars come from the movie's quality and the occupation. Equal timestamps occur, and the
    lines of a user are in no order of time, as in the real download. Every user rates at least one movie below 4 stars.

    Args:
        folder: made when missing.
        users: number of users, numbered from 1.
        movies: number of movies; their ids have gaps.
        ratings: fewest and most ratings of a user, both at most `movies`.
        seed: equal seeds give equal files.
    """
    random = np.random.default_rng(seed)
    genre = np.arange(movies) % 4
    quality = random.integers(1, 6, size=movies)
    ids = 3 * np.arange(movies) + 2
    rating_lines, user_lines = [], []
    for user in range(1, users + 1):
        gender, age = int(random.integers(2)), int(random.integers(len(AGES)))
        job = int(random.integers(len(OCCUPATIONS)))
        user_lines.append(f"{user}::{'FM'[gender]}::{AGES[age]}::{OCCUPATIONS[job]}::{random.integers(10000, 99999)}")
        taste = 2 * (AGES[age] >= 35) + gender
        own = np.flatnonzero(genre == taste)
        others = random.permutation(np.flatnonzero(genre != taste))
        start = int(random.integers(len(own)))
        favourites, rest = list(np.roll(own, -start)), list(others)
        lines, now = [], int(random.integers(900_000_000, 1_000_000_000))
        for number in range(int(random.integers(ratings[0], ratings[1] + 1))):
            source = favourites if (favourites and random.random() < 0.8) or not rest else rest
            movie = source.pop(0)
            stars = int(np.clip(quality[movie] + random.integers(-1, 2) + (job == 0), 1, 5))
            stars = min(stars, 3) if number == 0 else stars
            now += int(random.integers(0, 3)) * 60
            lines.append(f"{user}::{ids[movie]}::{stars}::{now}")
        rating_lines += [lines[k] for k in random.permutation(len(lines))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_text("\n".join(rating_lines) + "\n", encoding="latin-1")
    (folder / "users.dat").write_text("\n".join(user_lines) + "\n", encoding="latin-1")
    return folder
