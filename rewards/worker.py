"""The other side of `rewards.OwnProcess`: an interpreter that makes one reward and scores what it is sent.

A message is two lengths (8 bytes each, little-endian), a header in JSON and tensors as safetensors; nothing is pickled.
The process ends at once when the other side closes the pipe, or has gone, whatever it is doing then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from flowalign.interrupt import SIGNALS
from flowalign.out_of_memory import out_of_memory
from flowalign.records import Media, Prompts, Scores
from rewards.algebra import running_normalisers
from rewards.base import Reward
from rewards.server import make_reward

HEAD = struct.Struct("<QQ")
Message = tuple[dict[str, Any], dict[str, Tensor]]


def send(pipe: IO[bytes], told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a message. Raises: OSError where no one reads it, ValueError for what is no JSON."""
    try:
        header = json.dumps(told).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"a reward's config and prompts' metadata go to its process as JSON: {error}") from error
    body = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    pipe.write(HEAD.pack(len(header), len(body)))
    pipe.write(header)
    pipe.write(body)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Message:
    """The next message. Raises: EOFError where the other side has closed the pipe."""
    header, body = HEAD.unpack(_exactly(pipe, HEAD.size))
    told = json.loads(_exactly(pipe, header))
    return told, load(_exactly(pipe, body))


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    raw = pipe.read(size)
    if len(raw) < size:
        raise EOFError("the other side has closed the pipe")
    return raw


def media_message(media: Media, prompts: Prompts) -> Message:
    """Media and their prompts to be sent; a picture that several samples refer to is sent once."""
    references = media.references or ()
    distinct = {id(one): one for one in references}
    places = {key: place for place, key in enumerate(distinct)}
    tensors = {"pixels": media.pixels} | {f"reference/{places[key]}": one.clone() for key, one in distinct.items()}
    told = {
        "fps": media.fps, "references": None if media.references is None else [places[id(one)] for one in references],
        "text": prompts.text, "metadata": prompts.metadata, "groups": prompts.groups,
    }  # fmt: skip
    return told, tensors


def media_of(told: Mapping[str, Any], tensors: Mapping[str, Tensor], device: str) -> tuple[Media, Prompts]:
    """Media on a device, and their prompts, as they were before `media_message`."""
    places, groups = told["references"], told["groups"]
    references = None if places is None else tuple(tensors[f"reference/{place}"].to(device) for place in places)
    prompts = Prompts(tuple(told["text"]), tuple(told["metadata"]), None if groups is None else tuple(groups))
    return Media(tensors["pixels"].to(device), told["fps"], references), prompts


def scores_message(scores: Scores) -> Message:
    """Scores to be sent, without maps."""
    names = list(scores.parts)
    tensors = {f"part/{place}": scores.parts[name].clone() for place, name in enumerate(names)}
    return {"parts": names}, tensors | {"total": scores.total.clone(), "valid": scores.valid.clone()}


def scores_of(told: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Scores:
    """The same scores."""
    held = {name: value.to(device) for name, value in tensors.items()}
    parts = {name: held[f"part/{place}"] for place, name in enumerate(told["parts"])}
    return Scores(held["total"], parts, held["valid"])


def generators() -> Message:
    """Where the global generators of python, numpy and torch stand; of a GPU's the seed alone."""
    version, words, gauss = random.getstate()
    _, numbers, place, has_gauss, cached = np.random.get_state(legacy=True)
    told = {"python": [version, gauss], "numpy": [int(place), int(has_gauss), float(cached)]}
    told |= {"seed": [torch.initial_seed()]}
    state = {"rng/python": torch.tensor(words), "rng/numpy": torch.from_numpy(np.asarray(numbers, np.int64))}
    return {"rng": told}, state | {"rng/torch": torch.get_rng_state()}


def set_generators(told: Mapping[str, Any], tensors: Mapping[str, Tensor], seed: bool) -> None:
    """Put them where `generators` says. seed: set that of the GPUs too."""
    (version, gauss), (place, has_gauss, cached) = told["rng"]["python"], told["rng"]["numpy"]
    random.setstate((version, tuple(tensors["rng/python"].tolist()), gauss))
    np.random.set_state(("MT19937", tensors["rng/numpy"].numpy().astype(np.uint32), place, has_gauss, cached))
    if seed:
        torch.manual_seed(told["rng"]["seed"][0])
    torch.set_rng_state(tensors["rng/torch"])


def settings() -> dict[str, Any]:
    """What of this process changes how numbers are rounded, for the other one to have it too."""
    return {
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _set(told: Mapping[str, Any]) -> None:
    torch.set_num_threads(told["threads"])
    torch.set_float32_matmul_precision(told["matmul"])
    torch.use_deterministic_algorithms(told["deterministic"])


def _made(told: Mapping[str, Any]) -> Reward:
    reward = make_reward(told["reward"], told["allow_code"])
    inside = running_normalisers(reward)
    if inside:
        raise ValueError(f"{', '.join(inside)}: a running normaliser learns from the run: put it around OwnProcess")
    return reward


def _failure(error: Exception) -> dict[str, str]:
    """What the other side raises again."""
    kinds = {"memory": out_of_memory(error), "value": isinstance(error, ValueError), "os": isinstance(error, OSError)}
    kind = next((name for name, it_is in kinds.items() if it_is), type(error).__name__)
    if kind not in kinds:
        traceback.print_exc()
    return {"error": kind, "message": " ".join(str(error).split()) or type(error).__name__}


def _hear(pipe: IO[bytes], inbox: SimpleQueue[Message]) -> None:
    """In a thread: messages into the inbox, and the end where the other side has gone."""
    try:
        while True:
            inbox.put(receive(pipe))
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Make the reward that the first message names, then answer one message after another."""
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a library prints is no answer
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # they are meant for the run, which ends this process when it is done
    inbox: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_hear, args=(asked, inbox), daemon=True).start()
    told, _ = inbox.get()
    try:
        _set(told)
        reward = _made(told)
    except Exception as error:
        send(answers, _failure(error), {})
        return
    send(answers, {"name": reward.name, "card": asdict(reward.card)}, {})
    while True:
        send(answers, *_answer(reward, *inbox.get()))


def _answer(reward: Reward, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
    try:
        set_generators(told, tensors, seed=True)
        media, prompts = media_of(told, tensors, told["device"])
        with torch.no_grad():
            said, values = scores_message(reward.score(media, prompts))
        drawn, states = generators()
        return {"number": told["number"]} | said | drawn, values | states
    except Exception as error:
        return {"number": told["number"]} | _failure(error), {}
