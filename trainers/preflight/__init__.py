"""`flowalign check`: what a run would do and cost, from one tiny step, before the hours are spent.

geometry  how an epoch is cut up, and the network rows that it takes: counted, not measured
trial     the first group's rollouts, one micro-batch of the update and one call of the evaluation, discarded
costs     seconds, memory and disk of the whole run, from the two
problems  what would stop the run or spoil it: settings that do not go together, and what the trial has shown
text      all of it as a page to read, and the first group's contact sheet
"""

from __future__ import annotations

from trainers.preflight.checking import Preflight, inspect
from trainers.preflight.text import page

__all__ = ["Preflight", "inspect", "page"]
