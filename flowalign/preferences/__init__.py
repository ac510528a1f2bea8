"""Preferences between pictures or videos: read from many formats, checked, and as latents that are computed once.

Preferences("pairs.jsonl")                 a file or folder; `HubPreferences` for a dataset of the hub
open_pair(preferences.rows([0])[0])        the pixels of one pair
"""

from __future__ import annotations

from flowalign.preferences.columns import Columns, PairColumns, RankingColumns, Shares
from flowalign.preferences.opening import PairMedia, open_pair, readable
from flowalign.preferences.records import (
    Chosen,
    Label,
    Medium,
    Preference,
    PreferenceSet,
    Ranking,
    all_pairs,
    best_and_worst,
    pairs_of,
)
from flowalign.preferences.sources import HubPreferences, PreferenceData, Preferences, as_preferences

__all__ = [
    "Chosen",
    "Columns",
    "HubPreferences",
    "Label",
    "Medium",
    "PairColumns",
    "PairMedia",
    "Preference",
    "PreferenceData",
    "PreferenceSet",
    "Preferences",
    "Ranking",
    "RankingColumns",
    "Shares",
    "all_pairs",
    "as_preferences",
    "best_and_worst",
    "open_pair",
    "pairs_of",
    "readable",
]
