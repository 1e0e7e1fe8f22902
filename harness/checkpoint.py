"""
Weights on disk: checkpoints that a run goes on from, the export that others load, the model's
start.

No pickle is read or written: weights and Adam's moments are safetensors files, sharded, which any
number of ranks can read, each its own slices; the rest of a run's state is JSON.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from harness import lora
from harness.families import empty_model
from harness.ranks import all_reduce, leave_together, patiently, print0, rank, shard_of
from harness.settings import die, one_line

# What must not change between a checkpoint and the run that goes on from it
SAME = ("model", "objective", "data", "seed", "reference", "ref_every", "lora_rank")
SAME_ADAPTER = ("lora_alpha", "lora_targets")


def identity(cfg):
    """{key: value} of the settings that a checkpoint belongs to."""
    keys = SAME + SAME_ADAPTER if cfg.lora_rank else SAME
    return {key: getattr(cfg, key) for key in keys}


def tensors_of(model, optimizer, moving):
    """{name: trained weight}, {moment.name: Adam's}, {anchor.name: a moving reference's}: the very
    tensors, saved from and loaded into. What is frozen stands in the starting model's folder."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = dict(tensors)
    if moving is not None:
        for name, p in moving.named_parameters():
            found[f"anchor.{name}"] = p
    for name, p in tensors.items():
        if optimizer.state.get(p):
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{moment}.{name}"] = optimizer.state[p][moment]
    return found


@patiently
def save(cfg, model, optimizer, moving, progress):
    """Write checkpoints/step_N. False, with a warning, if that failed: the run goes on.

    It is written under a temporary name and renamed, so that a folder of the final name is whole.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    final = Path(cfg.out) / "checkpoints" / f"step_{progress['step']}"
    temporary = final.with_name("tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()

    tensors = tensors_of(model, optimizer, moving)
    error = None
    try:
        writer = HuggingFaceStorageWriter(str(temporary), pieces(tensors), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        if rank() == 0:
            state = dict(progress, updates=updates_of(optimizer), files=sizes(temporary))
            state.update(identity(cfg))
            (temporary / "state.json").write_text(json.dumps(state))
    except (Exception, dcp.api.CheckpointException) as failure:  # a full disk, most likely
        error = first_failure(failure)
    if all_reduce([error is not None], "max")[0]:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(p.numel() * p.element_size() for p in tensors.values())
        free = shutil.disk_usage(cfg.out).free
        kept = [path.name for path in listed(cfg.out)] or "none"
        print0(
            f"warning   checkpoint of step {progress['step']} not written: {size / 1e6:,.1f} MB "
            f"needed, {free / 1e6:,.1f} MB free; {kept} kept, the run continues: make room "
            f"before the next one ({one_line(error)[-150:]})"
        )
        return False

    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        rotate(cfg, progress["step"])
    dist.barrier()
    return True


PIECE = 2**30  # bytes of a file, about


def pieces(tensors):
    """{name: number of the file} of a rank's tensors, from 1 on. A file is made as a whole in the
    host's memory, where there are three copies of it for a moment: so they are many, and small."""
    found = {}
    written = 0
    for name, x in tensors.items():
        found[name] = 1 + written // PIECE
        written += shard_of(x).nbytes
    # Numbers without a gap, where one tensor is more than a file
    order = {number: i + 1 for i, number in enumerate(dict.fromkeys(found.values()))}
    return {name: order[number] for name, number in found.items()}


def rotate(cfg, step):
    """Remove all but the newest checkpoints up to `step`, and what a kill has left half removed or
    half written. What is not a whole checkpoint of this run stays as it is."""
    temporary = Path(cfg.out) / "checkpoints" / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    ours = [path for path in listed(cfg.out) if number_of(path) <= step]
    for old in ours[: -cfg.checkpoint_keep]:
        old.rename(temporary)  # whoever is killed from here on leaves no half of a checkpoint
        shutil.rmtree(temporary)


def start_moments(optimizer, updates):
    """Adam's state as it is after so many steps, with moments to be filled."""
    for p in optimizer.param_groups[0]["params"]:
        step = torch.full((), float(updates), device=p.device)
        optimizer.state[p] = dict(
            step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
        )


def updates_of(optimizer):
    """How many steps Adam has taken."""
    for state in optimizer.state.values():
        return int(state["step"])
    return 0


def first_failure(error):
    """dcp's error holds a traceback of each rank: the error of the first of them."""
    failures = getattr(error, "failures", None)
    if failures:
        return next(iter(failures.values()))[0]
    return error


def sizes(folder):
    """{name: bytes} of the files of a folder."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def listed(out):
    """The whole checkpoints in the folder of a run, oldest first."""
    found = [path for path in (Path(out) / "checkpoints").glob("step_*") if read_state(path)]
    return sorted(found, key=number_of)


def number_of(path):
    return int(path.name.removeprefix("step_"))


def read_state(path):
    """state.json of a whole checkpoint, else None: of a folder of another name (step_2-hf), of an
    empty one, of a copy that lacks a file or has half of one."""
    try:
        saved = json.loads((path / "state.json").read_text())
        is_whole = path.name == f"step_{saved['step']}"
        for name, size in saved.get("files", {}).items():  # the oldest checkpoints do not say
            is_whole = is_whole and (path / name).stat().st_size == size
        has_weights = any(path.glob("*.safetensors"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return saved if is_whole and has_weights else None


def find(cfg):
    """(path, state) of the newest checkpoint of a run that is to be resumed, else None. One of
    other settings is refused, and so is one that not all ranks see."""
    path = None
    saved = {}
    whole = listed(cfg.resume) if cfg.resume else []
    if whole:
        path = whole[-1]
        saved = read_state(path)
        refuse_other_run(cfg, path, saved)
    elif is_fork(cfg):
        die(f"{cfg.resume}/checkpoints holds no whole checkpoint to go on from into {cfg.out}")
    step = saved.get("step", 0)
    if all_reduce([step], "max") != [step]:
        die(
            f"rank {rank()} does not see the newest checkpoint of {cfg.resume}: it must be on a "
            "disk that all nodes share"
        )
    return (path, saved) if path else None


def is_fork(cfg):
    """Whether the run goes on from another run's checkpoint, in a folder of its own."""
    return bool(cfg.resume) and Path(cfg.resume).resolve() != Path(cfg.out).resolve()


def refuse_other_run(cfg, path, saved):
    """Leave if what is asked for is not the run that the checkpoint is of."""
    for key, value in identity(cfg).items():
        before = saved.get(key, getattr(type(cfg), key))  # a checkpoint from before there was a key
        if before != value:
            hint = "leave out --resume" if is_fork(cfg) else "give another --out"
            die(f"{path} was trained with {key} = {before!r}, this run has {value!r}: {hint}")
    if saved["step"] > cfg.steps:
        die(
            f"{path}: {saved['step']} steps are done and steps = {cfg.steps}: nothing is left to "
            "do; ask for more --steps"
        )


def adopt(path, out):
    """Make another run's checkpoint the first one of this run: links to its files, which nobody
    ever changes, or copies where the disk is another."""
    final = Path(out) / "checkpoints" / path.name
    temporary = final.with_name("tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(path, temporary, copy_function=link_or_copy)
    temporary.rename(final)


def link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load(cfg, found, model, optimizer, moving):
    """Fill model, optimizer and a moving reference in place, for any number of ranks; the run's
    progress {step, position, state, skipped}."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    path, saved = found
    if saved["updates"]:
        start_moments(optimizer, saved["updates"])
    dcp.load(
        tensors_of(model, optimizer, moving), storage_reader=HuggingFaceStorageReader(str(path))
    )
    if rank() == 0:
        rotate(cfg, saved["step"])  # which a kill may have interrupted
    keys = ("step", "position", "state", "skipped")  # the last is not in the oldest checkpoints
    return {key: saved[key] for key in keys if key in saved}


def load_model(model, folder):
    """Read the weights of a Hugging Face folder into a model in place, each rank its own slices.
    Tied weights appear once, as in the files; the head of log Z and adapters are in none. Files
    that hold a head of their own where the config says tied are refused."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if model.config.tie_word_embeddings:
        message = other_head(folder) if rank() == 0 else ""
        leave_together(message)
    weights = {}
    for name, p in model.named_parameters():
        if not (name.startswith("log_z.") or lora.is_adapter(name)):
            weights[name] = p
    try:
        dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(folder)))
    except (Exception, dcp.api.CheckpointException) as error:
        fault = one_line(first_failure(error))
        die(f"{folder}: its weights do not fit its config: {fault} (LAD_DEBUG=1 says where)")


def other_head(folder):
    """What is wrong with a folder whose config ties the head to the embedding, and whose files hold
    a head that is not the embedding; else ""."""
    from safetensors import safe_open

    found = {}  # {the end of a name: where it is}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                    found[name.split(".")[-2]] = (path, name)
    if len(found) < 2:
        return ""
    tensors = []
    for path, name in found.values():
        with safe_open(path, "pt") as file:
            tensors.append(file.get_tensor(name))
    if torch.equal(*tensors):
        return ""
    return (
        f"{folder}: its config.json says tie_word_embeddings = true, and its files hold an lm_head "
        "that is not the embedding; say false there, or leave the head out of the files"
    )


@patiently
def export(cfg, weights, config, tokenizer, folder):
    """Write out/hf, a save_pretrained folder that transformers, vLLM and eval.py load. weights: the
    whole tensors with their names, one at a time; folder: that of the starting model."""
    whole = {}
    for name, weight in weights:  # gathered on all ranks, kept on the first
        if rank() == 0:
            whole[name] = weight.cpu()
    if rank() == 0:
        try:
            save_pretrained(whole, config, tokenizer, folder, Path(cfg.out) / "hf")
        except Exception as error:
            size = sum(w.numel() * w.element_size() for w in whole.values())
            free = shutil.disk_usage(cfg.out).free
            die(
                f"{cfg.out}/hf not written: {one_line(error)}; {size / 1e6:,.1f} MB needed, "
                f"{free / 1e6:,.1f} MB free; the checkpoints are whole: make room, then --resume "
                f"{cfg.out}"
            )
    dist.barrier()


def save_pretrained(weights, config, tokenizer, folder, out):
    from transformers import GenerationConfig

    dtype = next(iter(weights.values())).dtype
    shell = empty_model(config, dtype=dtype)
    if os.path.exists(os.path.join(folder, "generation_config.json")):
        shell.generation_config = GenerationConfig.from_pretrained(folder)
    shell.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)
