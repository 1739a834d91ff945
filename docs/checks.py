"""Checks of what students write in tutorial.ipynb, and the slips that the checks name.

use(function) looks up the check of that name, check_… below. It calls the student's function, f,
with made-up numbers and compares with the program's own function in OWN. A slip is what a frequent
mistake would return: {what to say: the wrong result}. A function that is right takes the program's
place. What is wrong ends in NotYet, which Jupyter shows as one line.
"""

import inspect
import math
import re
import time
import traceback
import types
import zlib
from collections import Counter
from contextlib import nullcontext, suppress
from functools import wraps
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import vqldm


class NotYet(Exception):
    """What is wrong, in one line and without a traceback."""

    def _render_traceback_(self):
        return [f"not yet: {self}"]


class Unanswered(Exception):
    """The student's function still returns or yields `...`."""


def need(ok, message):
    """Refuse the answer with this message, unless ok."""
    if not ok:
        raise NotYet(message)


def veil(text):
    """Make a text unreadable at a glance, or readable again."""
    return "".join(chr(ord(letter) ^ 3) for letter in text)


# ---- Functions that only the page has. The others are the program's. -----------------------------


def guess(z, e, abar, c):
    """E[z0 | z_t] if z0 is one of the centres e."""
    at_centres = torch.distributions.Normal(abar.sqrt()[:, None] * e, c.sqrt()[:, None])
    return at_centres.log_prob(z[:, None]).sum(2).softmax(1) @ e


def score(z, e, abar, c):
    """The slope of the log density of z_t."""
    return (abar.sqrt() * OWN.guess(z, e, abar, c) - z) / c


def attend(q, k, v):
    """What each cell receives, and how much of it from each cell."""
    weights = torch.softmax(torch.einsum("bic,bjc->bij", q, k) / math.sqrt(q.shape[-1]), -1)
    return torch.bmm(weights, v), weights


def d_step(D, optimizer, x, x_hat):
    """One step of the discriminator. x_hat is only looked at."""
    d_loss = (F.relu(1 - D(x)).mean() + F.relu(1 + D(x_hat.detach())).mean()) / 2
    D.zero_grad()
    d_loss.backward()
    optimizer.step()
    return d_loss


ONLY_HERE = guess, score, attend, d_step
PAGE = types.SimpleNamespace(**{function.__name__: function for function in ONLY_HERE})
PAGE.noisy_sample = vqldm.Diffusion.sample  # with an eta above 0. Exercise 6 leaves that out
PLACES = {  # where the program, or the page, looks for each function, and under what name
    **{name: (vqldm.Diffusion, name) for name in ("add_noise", "loss", "predict", "sample")},
    **{name: (vqldm, name) for name in ("update_ema", "guided", "adaptive_weight")},
    **{name: (PAGE, name) for name in vars(PAGE)},
    "nearest": (vqldm.Codebook, "nearest"),
    "quantize": (vqldm.Codebook, "forward"),
    "forward": (vqldm.ResBlock, "forward"),
}
OWN = types.SimpleNamespace(**{name: getattr(*place) for name, place in PLACES.items()})

# ---- From a student's function to the program ----------------------------------------------------

RIGHTS = {}  # the names that were answered rightly
CALLS = Counter()  # how often each student's function was called

SHARES = "diffusion.shares takes whole t and gives factors (B,1,1,1)"
HINTS = {  # what to say if a function stops because shapes or types do not fit
    **dict.fromkeys(["add_noise", "loss", "predict"], SHARES),
    "guess": "z[:, None] is (B,1,2), and abar.sqrt()[:, None] * e is (B,M,2). Their difference has "
    "all pairs. c is (B,1), so sum the squares before you divide by it",
    "score": "Pairs are as in guess, and torch.autograd.grad wants one number, such as a sum",
    "sample": "The calls are predict(net(z, t), z, t) and add_noise(z0_hat, t_prev, eps_hat)",
    "noisy_sample": "noise() draws n. At eta = 0 noise is None, so ask before you call it",
    "guided": "strong and weak are networks, so ask them, as in strong(z_t, t)",
    "nearest": "z.permute(0, 2, 3, 1) is (B,h,w,d), so its last axis fits the codes' (K,d)",
    "adaptive_weight": "torch.autograd.grad returns a tuple, and frees the graph that both losses "
    "share, unless you say retain_graph=True",
    "attend": "k.transpose(1, 2) is (B,C,N), so q @ k.transpose(1, 2) is (B,N,N)",
    "forward": "scale and shift are (B,c), and need two more axes, [:, :, None, None]",
    "update_ema": "Is @torch.no_grad() above your function? Weights want no gradient here",
    "quantize": "book.nearest(z) gives k (B,h,w), and book.lookup(k) the codes (B,d,h,w)",
    "d_step": "D(x) and D(x_hat.detach()) are D's numbers, and your loss is one number",
}


def use(answer):
    """Check a student's function, and let the program use it if it is right."""
    name = name_of(answer, inspect.currentframe().f_back.f_globals)
    example = "Write use(add_noise), for example, without brackets behind add_noise"
    need(name in PLACES, f"use() wants one of the page's functions. {example}")
    CALLS.pop(name, None)
    words = list(inspect.signature(getattr(OWN, name)).parameters)

    def itself(*given, **named):
        raise NotYet(f"your {name} calls {name}, so it would call itself. Write its lines yourself")

    def tried(*given, **named):
        before = [] if name in CHANGES else [*kept(words, given)]
        out = answer(*given, **named)
        if out is ...:
            raise Unanswered
        need(out is not None or name == "update_ema", "your function returns nothing")
        for word, x, copy in before:
            slip = f"`{word} = {word} + …` makes a new tensor, `{word} += …` does not"
            need(torch.equal(x.detach(), copy), f"you write into {word} itself. {slip}")
        return out

    setattr(*PLACES[name], itself)
    try:
        globals()[f"check_{name}"](tried)
    except Unanswered:
        still = "yields" if inspect.isgeneratorfunction(inspect.unwrap(answer)) else "returns"
        return print(f"○ {name} still {still} `...`, so the page keeps its own")
    except NotYet:
        raise
    except RecursionError:
        itself()
    except Exception as error:
        raise NotYet(where_it_stops(name, answer, error)) from None
    finally:
        setattr(*PLACES[name], getattr(OWN, name))

    @wraps(answer)
    def counted(*given, **named):
        CALLS[name] += 1
        out = answer(*given, **named)
        return tuple(map(torch.as_tensor, out)) if name == "adaptive_weight" else out

    CALLS[name], RIGHTS[name] = 0, True
    setattr(*PLACES[name], counted)
    print(f"✓ {name} is right, and from here on it is used")


CHANGES = "update_ema", "d_step"  # they write into a network, as they should


def kept(words, given):
    """Yield the name, the tensor and a copy of it, of all tensors that a function is given."""
    for word, x in zip(words, given):
        found = {word: x} if torch.is_tensor(x) else {}
        if isinstance(x, nn.Module):
            found = {f"{word}.{name}": p for name, p in x.named_parameters()}
        for name, tensor in found.items():
            yield name, tensor, tensor.detach().clone()


def name_of(answer, page):
    """A function's name, or that of the variable which holds it, as in add_noise = lambda …"""
    name = getattr(answer, "__name__", None)
    if name in PLACES or not callable(answer):
        return name
    return next((name for name in PLACES if page.get(name) is answer), None)


def where_it_stops(name, answer, error):
    """One line about an error that a student's function has raised."""
    said = (str(error).splitlines() or [""])[0]
    dots = re.search(r"'ellipsis'|not ellipsis|got \(.*ellipsis", said)  # not in indices or einsum
    need(not dots, "there is still a ... in your function")
    file = getattr(getattr(inspect.unwrap(answer), "__code__", None), "co_filename", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if frame.filename == file and frame.line]
    hint = HINTS.get(name, "") if isinstance(error, (TypeError, RuntimeError, IndexError)) else ""
    if name == "forward" and "None" in said:
        hint = "In stage 1 block.emb and emb are None, so ask first"
    elif name == "forward" and "size of tensor" not in said:
        hint = ""
    line = f" at `{lines[-1]}`" if lines else ""
    return f"{name} stops{line}. {hint + '. ' * bool(hint)}{type(error).__name__}: {said}"


def check(name, answer):
    """Check an answer that is no function."""
    if answer is ...:
        return print("○ not answered yet")
    globals()[f"check_{name}"](answer)
    RIGHTS[name] = True
    print("✓ right")


def yours():
    """Print which of the student's functions are in use, and how often each was called."""
    print("yours:", ", ".join(f"{name} ({CALLS[name]} calls)" for name in CALLS) or "none yet")


# ---- What the checks share -----------------------------------------------------------------------


def normal(*shape, key=0):
    """Standard normal numbers, always the same ones."""
    return torch.randn(shape, generator=vqldm.rng("check", key))


def same(a, b, tolerance=1e-3):
    """Are a and b tensors of one shape, and their numbers nearly equal?"""
    return torch.is_tensor(a) and a.shape == b.shape and bool(((a - b).abs() <= tolerance).all())


def steady(a, b):
    """Do two calls give the same? (Where both give nan, they do.)"""
    return not torch.is_tensor(a) or same(a.nan_to_num(), b.nan_to_num())


def single(x):
    """Double precision is as good as single where a loss is meant."""
    return x.float() if torch.is_tensor(x) and x.dtype == torch.float64 else x


def pair(out):
    """Is this two things?"""
    two = isinstance(out, (tuple, list)) or torch.is_tensor(out) and out.ndim > 0
    return two and len(out) == 2


def gradients(out, given):
    """{name: tensor} -> {name: the gradient of out's sum at it}, 0 where none arrives"""
    if not out.requires_grad:
        return {name: torch.zeros_like(x) for name, x in given.items()}
    keep = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return dict(zip(given, torch.autograd.grad(out.sum(), list(given.values()), **keep)))


def compare(mine, true, what, slips=(), tolerance=1e-3):
    """Refuse mine unless it is like true. slips is {what to say: what a mistake would give}."""
    need(torch.is_tensor(mine), f"{what} should be a tensor, not {type(mine).__name__}")
    close = min(tolerance, 1e-3)
    shapes = f"{tuple(mine.shape)} instead of {tuple(true.shape)}"
    need(mine.shape == true.shape, f"{what} has the shape {shapes}")
    for message, wrong in dict(slips).items():
        need(not same(mine, wrong, close) or same(mine, true, close), message)
    need(not mine.isnan().any(), f"{what} has nan in it, as 0 / 0 or the root of less than 0 is")
    off = float((mine.detach().float() - true.detach().float()).abs().max())
    need(off <= tolerance, f"{what} is off by up to {off:.2g}")
    kinds = [str(x.dtype).removeprefix("torch.") for x in (mine, true)]
    fits = kinds[0] == kinds[1] or not (mine.is_floating_point() or true.is_floating_point())
    need(fits, f"{what} is {kinds[0]}, and should be {kinds[1]}")


ANOTHER = "use the argument diffusion, not the page's. Chapter 3 calls you with other schedules"

# ---- The checks, in the page's order -------------------------------------------------------------


def check_add_noise(f):
    """Many levels at once, one level, level -1, and another schedule."""
    diffusion, t = vqldm.Diffusion(200), torch.tensor([80, -1, 0, 20, 150, 199])
    z0, eps = normal(6, 3, 20, 30), normal(6, 3, 20, 30, key=1)
    (a, b), fade = diffusion.shares(t), t.view(-1, 1, 1, 1) / 200
    z = f(diffusion, z0, t, eps)
    fixed = steady(z, f(diffusion, z0, t, eps))
    need(fixed, "called twice, yours gives two results. Draw no noise, and take eps")
    slips = {
        "shares gives the roots, and you use their squares": a**2 * z0 + b**2 * eps,
        "shares has taken the roots already": a.sqrt() * z0 + b.sqrt() * eps,
        "z0 and eps are swapped. At small t nearly all is z0": b * z0 + a * eps,
        "the factor of eps is √(1-ᾱ), and yours is 1 - √ᾱ": a * z0 + (1 - a) * eps,
        "the factor of eps is √(1-ᾱ), and yours is √(1-√ᾱ)": a * z0 + (1 - a).sqrt() * eps,
        "the factor of eps is √(1-ᾱ), and yours lacks the root": a * z0 + b**2 * eps,
        "the factor of z0 is √ᾱ, and yours lacks the root": a**2 * z0 + b * eps,
        "eps is multiplied by √(1-ᾱ) as well, or the variance of your z_t is not 1": a * z0 + eps,
        "z0 is multiplied by √ᾱ as well, or the variance of your z_t is not 1": z0 + b * eps,
        "noise is added. You subtract it, and that is another z_t": a * z0 - b * eps,
        "ᾱ is not 1 - t/T. diffusion.shares has the factors": (1 - fade) * z0 + fade * eps,
        "each latent has a level of its own. You use the first for all": a[:1] * z0 + b[:1] * eps,
    }
    compare(z, OWN.add_noise(diffusion, z0, t, eps), "your z_t", slips)
    for level in (20, -1):
        z = None
        with suppress(TypeError, IndexError, AttributeError):
            z = f(diffusion, z0, level, eps)
        number = f"t may also be one number, such as {level} in the walk of chapter 4"
        need(z is not None, f"{number}. diffusion.shares takes both, and your function stops")
        true = OWN.add_noise(diffusion, z0, level, eps)
        compare(z, true, f"if t is the number {level}, your z_t")
    linear, z0, eps = vqldm.Diffusion(100, "linear"), z0[:2, :2, :1, :1], eps[:2, :2, :1, :1]
    slips = {ANOTHER: OWN.add_noise(diffusion, z0, 60, eps)}
    true = OWN.add_noise(linear, z0, 60, eps)
    compare(f(linear, z0, 60, eps), true, "with another schedule your z_t", slips)


def check_guess(f):
    """Five centres, and seven points that have an ᾱ and a c each."""
    e, z, one = normal(5, 2), normal(7, 2, key=1), torch.ones(7, 1)
    abar = torch.linspace(0.1, 0.9, 7)[:, None]
    c = torch.linspace(0.8, 0.4, 7)[:, None]
    shrunk = abar.sqrt()[:, None] * e  # (7,5,2)
    away = (z[:, None] - shrunk).square().sum(2)  # (7,5)
    right_p = torch.softmax(-away / (2 * c), 1)

    def like(size, centres=shrunk, dim=1, points=z):
        squares = (points[:, None] - centres).square().sum(2)
        return torch.softmax(-squares / size, dim) @ e

    each = torch.softmax(-(z[:, None] - shrunk).square() / (2 * c[:, None]), 1)  # (7,5,2)

    slips = {
        "each point has an ᾱ of its own. You use the first": like(2 * c, abar[0].sqrt() * e),
        "each point has a c of its own. You use the first": like(2 * c[0]),
        "you forgot to shrink the centres. z_t lies around √ᾱ e, not around e": like(2 * c, e),
        "you shrink the centres by ᾱ, and should by its root": like(2 * c, abar[:, None] * e),
        "z/√ᾱ - e is not the distance, but 1/√ᾱ times as long": like(2 * c, e, 1, z / abar.sqrt()),
        "you forgot the 2. A normal density has the distance² over 2c in it": like(c),
        "you forgot c. A normal density has the distance² over 2c in it": like(2),
        "you forgot 2c. A normal density has the distance² over 2c in it": like(1),
        "your variance is 1 - ᾱ, of the noise alone. c has the blob's as well": like(2 - 2 * abar),
        "c is a variance already, and you square it": like(2 * c**2),
        "you take the root of c. The distance² is divided by 2c itself": like(2 * c.sqrt()),
        "a centre has one p, not one for each coordinate. Sum the squares first": (each * e).sum(1),
        "you forgot to square the distance": torch.softmax(-away.sqrt() / (2 * c), 1) @ e,
        "you take the nearest centre. Take the mean of all, weighted by p": e[away.argmin(1)],
        "the sign is wrong. You make the farthest centre the most probable": like(-2 * c),
        "your p sum to 1 over the points. They should over the centres": like(2 * c, dim=0),
        "take the mean of e, not of the shrunk centres": (right_p[..., None] * shrunk).sum(1),
        "your p do not sum to 1. Divide by their sum, or use softmax": (-away / (2 * c)).exp() @ e,
    }
    compare(f(z, e, abar, c), OWN.guess(z, e, abar, c), "your guess", slips)
    little = z, e, one, 1e-4 * one  # noise
    lost = "with hardly any noise, exp() of every centre underflows to 0, so p is lost"
    need(same(f(*little), OWN.guess(*little)), f"{lost}. torch.softmax avoids that")
    many = normal(1000, 2), normal(24, 2, key=1), one[0].expand(1000, 1), one[0].expand(1000, 1)
    mine, quick = seconds(f, *many), seconds(OWN.guess, *many)
    slow = f"right, but slow: 1,000 points take {mine:.2g} s, and chapter 5 asks for ten million"
    need(mine < max(0.01, 40 * quick), f"{slow}. Do without a loop over points")


def seconds(f, *given):
    """How long a call takes: the shortest of three, as other programs run beside this one."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        f(*given)
        took.append(time.perf_counter() - start)
    return min(took)


def check_loss(f):
    """Networks that answer 0 or know the goal, which is v or ε, and another schedule."""
    diffusion, z0, eps = vqldm.Diffusion(200), normal(64, 2, 3, 4), normal(64, 2, 3, 4, key=1)
    t, label = torch.arange(64) * 3, torch.arange(64) % 4
    (a, b), asked, weight = diffusion.shares(t), [], torch.ones(1, requires_grad=True)
    v, z_t = a * eps - b * z0, a * z0 + b * eps

    def net(answer):
        return lambda z_t, t, label=None: asked.append((z_t, t, label)) or weight * answer

    def mean(x):
        return x.flatten(1).mean(1)

    for target, goal in (("v", v), ("eps", eps)):
        way, name = vqldm.Diffusion(200, target=target), "v" if target == "v" else "ε"
        asked.clear()
        out = f(way, net(goal), z0, t, eps, label)
        nothing = f(way, net(0 * z0), z0, t, eps, label)
        each = torch.is_tensor(out) and out.shape == (64,)
        need(each, "the loss should have one number for each latent, (B,), its own mean")
        weighted = diffusion.weight(t) * mean(goal**2)
        slips = {
            "you sum over a latent's numbers, and should take their mean": 24 * mean(goal**2),
            "there is no factor 1/2 in this loss": mean(goal**2) / 2,
            "the program multiplies by weight(t). Leave that to it": weighted,
            "you forgot to square the difference": mean(goal.abs()),
            f"you compare with ε, and should with {name}": mean(eps**2),
            f"you compare with v, and should with {name}": mean(v**2),
            f"you compare with z0, and should with {name}": mean(z0**2),
            "you compare z0_hat with z0. Compare the answer itself": mean((a * z_t - z0) ** 2),
            "you compare eps_hat with ε. Compare the answer itself": mean((b * z_t - eps) ** 2),
            "a sign of v is wrong. It is √ᾱ ε - √(1-ᾱ) z0": mean((a * eps + b * z0) ** 2),
            "the factors of v are swapped. It is √ᾱ ε - √(1-ᾱ) z0": mean((b * eps - a * z0) ** 2),
        }
        answered_0 = f"for the target {name} and an answer of 0, your loss"
        compare(single(nothing), mean(goal**2), answered_0, slips)
        need(len(asked) == 2, "the network should be asked once, with z_t, t and label")
        slips = {"your network is shown z0 itself, without noise": z0}
        compare(asked[0][0], z_t, f"the z_t that your network is shown, with {target},", slips)
        given = all(torch.is_tensor(x) and x.shape == (64,) for x in asked[0][1:])
        given = given and torch.equal(asked[0][1], t) and torch.equal(asked[0][2], label)
        need(given, "the network should be given t and label as they are")
        slips = {"the sign of v is wrong. It is √ᾱ ε - √(1-ᾱ) z0": 4 * mean(v**2)}
        knows = f"for a network that knows {name} the loss is 0, and yours"
        compare(out, torch.zeros_like(out), knows, slips)
        need(out.requires_grad, "no gradient reaches the network. Leave out no_grad() and detach()")
    z0, eps, linear = z0[..., :1, :1], eps[..., :1, :1], vqldm.Diffusion(100, "linear")
    given = net(0 * z0), z0, t // 2, eps, label
    slips = {ANOTHER: OWN.loss(diffusion, *given)}
    true = OWN.loss(linear, *given)
    compare(single(f(linear, *given)), true, "for points, with another schedule, your loss", slips)


def check_predict(f):
    """The way back from v and from ε, with a large number that must not be clipped."""
    t, z0, eps = torch.arange(6) * 39, normal(6, 2, 3, 4), normal(6, 2, 3, 4, key=1)
    z0[:, 0, 0, 0] = 9
    for target in ("v", "eps"):
        diffusion = vqldm.Diffusion(200, "linear", target)
        z_t, (cos, sin) = OWN.add_noise(diffusion, z0, t, eps), diffusion.shares(t)
        v = cos * eps - sin * z0
        out = f(diffusion, v if target == "v" else eps, z_t, t)
        need(pair(out), "return two things, z0_hat and eps_hat")
        swapped = same(out[0], eps, 0.02) and same(out[1], z0, 0.02)
        need(not swapped, "your two outputs are swapped. z0_hat comes first")
        clipped = not same(out[0], z0, 0.02) and same(out[0][:, 1], z0[:, 1], 0.02)
        need(not clipped, "only the large values of your z0_hat are wrong. Do not clip it")
        slips = {
            "that is the formula for ε. Here the network answers v": (z_t - sin * v) / cos,
            "a sign of z0_hat is wrong. Turn the arrows back, not on": cos * z_t + sin * v,
            "cos φ and sin φ are swapped in z0_hat": sin * z_t - cos * v,
        }
        slips = slips if target == "v" else {}
        compare(out[0], z0, f"given the true {target}, your z0_hat", slips, 0.02)
        slips = {
            "a sign of eps_hat is wrong. It is sin φ z_t + cos φ v": sin * z_t - cos * v,
            "that is v's own formula. It is sin φ z_t + cos φ v": cos * v - sin * z_t,
            "you return v as eps_hat. Noise is a part of v only": v,
            "z_t holds cos φ z0_hat, and you subtract z0_hat itself": (z_t - z0) / sin,
            "z_t - cos φ z0_hat is sin φ eps_hat. Divide by sin φ": z_t - cos * z0,
        }
        slips = slips if target == "v" else {}
        compare(out[1], eps, f"given the true {target}, your eps_hat", slips, 0.02)


def check_update_ema(f):
    """Two small networks, early and late in a training."""

    def weights(net):
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    for step, decay in ((0, 0.99), (500, 0.5), (10, 0.99), (10**4, 0.99)):
        ema, net = nn.Linear(3, 4), nn.Linear(3, 4)  # of two tensors each, weight and bias
        old, new = weights(ema), weights(net)
        f(ema, net, step, decay)
        warm = min(decay, (1 + step) / (10 + step))
        right = warm * old + (1 - warm) * new
        need(torch.equal(weights(net), new), "you have changed net, and should change ema")
        first = torch.cat([right[:12], old[12:]])
        slips = {
            "only the first tensor of ema is right. Move the biases too": first,
            "ema has not changed. Write into its tensors, as p.mul_ and p.add_ do": old,
            "decay and 1 - decay are swapped": (1 - warm) * old + warm * new,
            "you forgot the trap. Early in training less is kept": decay * old + (1 - decay) * new,
            "you forgot decay, the most that is kept": ((1 + step) * old + 9 * new) / (10 + step),
        }
        compare(weights(ema), right, f"at step {step} a weight of ema", slips, 1e-5)


def check_score(f):
    """Two levels, at which c is not 1 - ᾱ."""
    e, z = normal(5, 2), normal(7, 2, key=1)
    for abar, c in ((0.3, 0.8), (0.9, 0.2)):
        given = e, torch.full((7, 1), abar), torch.full((7, 1), c)
        true = OWN.score(z, *given)
        log_p = -torch.cdist(z, abar**0.5 * e).square() / (2 * c)
        unshrunk = (-torch.cdist(z, e).square() / (2 * c)).softmax(1) @ e
        alone = OWN.score(z, *given[:2], 1 - given[1])
        slips = {
            "you forgot to divide by c. The slope of distance²/2c is the way over c": c * true,
            "you divide by 2c. The 2 goes when the square is derived": true / 2,
            "you forgot to shrink the guess by √ᾱ": (OWN.guess(z, *given) - z) / c,
            "you forgot to shrink the centres by √ᾱ": (unshrunk - z) / c,
            "that is the slope of p, not of log p": log_p.exp().sum(1, keepdim=True) * true,
            "your variance is 1 - ᾱ, of the noise alone. c has the blob's as well": alone,
            "your score leads away from the data": -true,
        }
        compare(f(z.clone(), *given), true, "your score", slips)


NO_GRAD = "the walk remembers all steps for a gradient. Put @torch.no_grad() above your function"


def check_sample(f):
    """Five and three steps, and another schedule, with a network that notes what it is asked."""
    big = torch.tensor([9.0, 0]).view(1, 2, 1, 1)  # so that z0_hat has large values

    weight = torch.ones(1, requires_grad=True)

    def answer(z, t):
        return weight * ((z * 2).sin() + t.view(-1, 1, 1, 1) / 200 + big)

    def net(z, t):
        each = torch.is_tensor(t) and t.shape == z.shape[:1]
        need(each, "the network wants t as (B,), one number for each latent")
        need(not t.is_floating_point(), "t should be whole, as torch.full((len(z),), t) is")
        asked.append(int(t[0]))
        shown.append(z.clone())
        return answer(z, t)

    cosine, linear = vqldm.Diffusion(200), vqldm.Diffusion(200, "linear")
    for diffusion, steps, n in ((cosine, 5, 3), (cosine, 3, 1), (linear, 4, 2)):
        start = normal(n, 2, 2, 3)
        asked, shown, found, z, pairs = [], [], [], start.clone(), diffusion.pairs(steps)
        walk = f(diffusion, net, z, steps, 0, None)
        ended = isinstance(walk, tuple) and len(asked) == 1
        need(not ended, "`return` ends the walk after one step. `yield` goes on")
        for two in walk:
            if two is ...:
                raise Unanswered
            found.append(two)
        last = found[-1] if found and pair(found[-1]) else ()
        need(not any(torch.is_tensor(x) and x.requires_grad for x in last), NO_GRAD)
        one = "you write into z itself, so all steps yield the same tensor"
        need(same(z, start), f"{one}. Make a new one in each step, as in z = ...")
        levels = [t for t, _ in pairs]
        words = f"the network was asked at the levels {asked}, and should be at {levels}"
        need(asked == levels, f"in {steps} steps {words}")
        ok = len(found) == steps and all(pair(two) for two in found)
        need(ok, "yield a pair, z and z0_hat, after each step")
        true = list(OWN.sample(diffusion, net, z, steps, 0, None))
        *_, (other, _) = OWN.sample(cosine, net, z, steps, 0, None)
        need(same(found[-1][0], true[-1][0]) or not same(found[-1][0], other), ANOTHER)
        swapped = same(found[0][1], true[0][0]) and same(found[0][0], true[0][1])
        need(not swapped, "yield z first, then z0_hat. Yours are swapped")
        need(not same(found[1][0], true[0][0]), "you yield before you mix. z is late by a step")
        need(same(shown[0], start), "start from the given z, not from noise of your own")
        stands = same(shown[1], start) and not same(found[0][0], start)
        need(not stands, "in step 2 the network is shown the first z again. Let z be the new one")
        (again, _), *_ = f(diffusion, net, z, steps, 0, None)
        need(steady(again, found[0][0]), "you mix with fresh noise. DDIM mixes with eps_hat")
        before = [z] + [z for z, _ in true]
        for i, (t, t_prev) in enumerate(pairs):
            out = answer(before[i], torch.full((n,), t)).detach()
            of_step = diffusion, t, t_prev, before[i], out, start
            check_step(f"after step {i + 1} of {steps}", found[i], true[i], *of_step)


def check_step(when, mine, true, diffusion, t, t_prev, z, out, start):
    """One step of a walk from z: z0_hat, and then the new z."""
    z0_hat, eps_hat = OWN.predict(diffusion, out, z, torch.full((len(z),), t))
    abar_prev, (a, b) = diffusion.alpha_bar[t_prev], diffusion.shares(t)
    alpha = diffusion.alpha_bar[t] / abar_prev

    def mix(z0_hat, noise):
        return OWN.add_noise(diffusion, z0_hat, t_prev, noise)

    makes = "diffusion.predict makes z0_hat and eps_hat of it"
    slips = {
        f"the network answers v, and you take it for z0_hat. {makes}": out,
        f"the network answers v, and you take it for ε. {makes}": (z - b * out) / a,
        "your z0_hat is clipped. Here it has large values": z0_hat.clamp(-3, 3),
        "you yield eps_hat in the place of z0_hat": eps_hat,
        "you yield z twice. The second of the pair is z0_hat": true[0],
        "the second of the pair is z0_hat. You yield the z that the step began with": z,
    }
    compare(mine[1], true[1], f"{when} your z0_hat", slips)
    slips = {
        "you mix at t, where z was before, and should mix at t_prev": z,
        f"you mix with what the network answers, v. {makes}": mix(z0_hat, out),
        "you add noise to z, where the walk is. Add it to z0_hat": mix(z, eps_hat),
        "you mix with the first z, and should with eps_hat": mix(z0_hat, start),
        "z0_hat and eps_hat are swapped in your mix": mix(eps_hat, z0_hat),
        "that is the mean of DDPM's Algorithm 2, which renews a part of the noise. Here, at η = 0, "
        "eps_hat keeps all of it": (z - (1 - alpha) / b * eps_hat) / alpha.sqrt(),
        "the factor of eps_hat lacks its root": mix(z0_hat, (1 - abar_prev).sqrt() * eps_hat),
        "you go all the way to z0_hat. Mix it with eps_hat, by add_noise at t_prev": z0_hat,
    }
    compare(mine[0], true[0], f"{when} your z", slips, 5e-3)


def check_guided(f):
    """Many strengths, with three networks that note that they were asked."""

    def witness(asked, name, answer):
        return lambda z_t, t: asked.append(name) or answer(z_t + t.view(-1, 1, 1, 1) / 99)

    z, t = normal(2, 3, 1, 1), torch.full((2,), 20)
    strong, young, plain = [answer(z + 20 / 99) for answer in (torch.sin, torch.cos, torch.tanh)]
    whom = []
    for weights in ((3,), (3, 2), (0.5, 1), (1, 4), (1,), (0,), ()):
        out, asked = [], ([], [])  # by yours, and by the program's
        for guided, by in zip((f, OWN.guided), asked):
            weaker = witness(by, "young", torch.cos), witness(by, "without class", torch.tanh)
            net = guided(witness(by, "strong", torch.sin), *zip(weaker, weights))
            need(callable(net), "return a function of z_t and t")
            out.append(net(z, t))
            if out[0] is ...:
                raise Unanswered
        whom.append((weights, *asked))
        pulls = [(w, strong - weak) for w, weak in zip(weights, (young, plain))]
        added = [(w - 1) * difference for w, difference in pulls]
        first, last = strong + sum(added[:1]), sum(added[1:])
        alone = [pull for pull in added if pull.any()][-1:] or [torch.full((), math.nan)]
        best = "(`out += ...` changes best as well. `out = out + ...` does not)"
        slips = {
            "your out is the pull alone. Add it, out = out + ...": alone[0],
            "your factor is w, and should be w - 1": strong + sum(w * d for w, d in pulls),
            "w - 1 needs brackets, (w - 1) * ...": strong + sum(w - d for w, d in pulls),
            "the sign is wrong. Walk away from the weaker networks": strong - sum(added),
            "from the weak answer the factor is w": strong + sum((w - 2) * d for w, d in pulls),
            "you add no pull to the strong answer": strong,
            "only the last of the two pulls is left. Add both": strong + last,
            "only the first of the two pulls is left. Is `return` inside the loop?": first,
            "each difference is strong minus weak. Yours starts from what the first pull has made. "
            f"{best}": first + sum((w - 1) * (first - plain) for w, _ in pulls[1:]),
        }
        compare(*out, f"with the strengths {weights} your answer", slips)
    for weights, mine, right in whom:
        asked = f"you asked {' and '.join(mine) or 'nobody'}, and should {' and '.join(right)}"
        need(sorted(mine) == sorted(right), f"with the strengths {weights} {asked}, once each")


def check_nearest(f):
    """A codebook so full that distances in bf16 would change some of the choices."""
    book, z = vqldm.Codebook(300, 2), normal(4, 2, 7, 3)
    compare(f(book, z), OWN.nearest(book, z), "for vectors of two numbers k", (), math.inf)
    book, z = vqldm.Codebook(300, 3), normal(2, 3, 5, 20)
    e = book.embedding.weight.data = normal(300, 3, key=1)
    e[150:] = e[:150] + 2e-3 * e[150:]
    vectors = z.permute(0, 2, 3, 1)
    right, k, away = OWN.nearest(book, z), f(book, z), vectors[..., None, :] - e
    whole = not torch.is_tensor(k) or k.dtype in (torch.int64, torch.int32)
    need(whole, "k should be whole numbers, int64, as argmin gives them")
    early = torch.cdist(z.reshape(-1, 3), e).argmin(1).view(2, 5, 20)
    slips = {
        "its channels must be last before you cut z into vectors, permute(0, 2, 3, 1)": early,
        "you took the farthest code. argmin, not argmax": away.square().sum(-1).argmax(-1),
        "you took the largest product, and should the least distance": (vectors @ e.T).argmax(-1),
        "add up squares, or plus and minus cancel": away.sum(-1).argmin(-1),
    }
    compare(k, right, "k", slips, math.inf)
    wrong = int((k != right).sum())
    said = f"{wrong} of 200 vectors got a code that is not the nearest"
    need(not 0 < wrong < 60, f"{said}. Compare with all codes, and keep distances in float32")
    need(not wrong, f"{said}. Are the channels last, and do you square the differences?")


def check_quantize(f):
    """The four results, and at z and at the codes the gradients of z_q and of both losses."""
    book, z = vqldm.Codebook(30, 3), normal(2, 3, 4, 5).requires_grad_()
    e = book.embedding.weight
    e.data = normal(30, 3, key=1)
    out, true = f(book, z), OWN.quantize(book, z)
    four = isinstance(out, (tuple, list)) and len(out) == 4
    need(four, "return four things, z_q, k, the codebook loss and the commitment loss")
    need(all(torch.is_tensor(x) for x in out), "all four results should be tensors")
    need(out[1].shape == true[1].shape, "k comes second and is (B,h,w). book.nearest(z) makes it")
    compare(out[1], true[1], "k", (), 0)
    slips = {"your z_q has the value of z. It should be that of the nearest code": z.detach()}
    compare(out[0], true[0], "z_q", slips)
    at, error = {"z": z, "codes": e}, true[2].detach()
    for mine, right, what in zip(out[2:], true[2:], ("codebook", "commitment")):
        slips = {
            "is the sum of the squares, and should be their mean": error * z.numel(),
            "has the weight 0.25 already. The program multiplies later": error / 4,
            "is 0, because it compares a thing with itself": 0 * error,
        }
        slips = {f"your {what} loss {slip}": wrong for slip, wrong in slips.items()}
        compare(single(mine), right, f"your {what} loss", slips, 1e-5)
    push = normal(2, 3, 4, 5, key=2)
    to_z, to_codes = gradients(out[0] * push, at).values()
    lost = "no gradient of z_q reaches z, so the encoder could not learn from the image"
    need(to_z.any() or not to_codes.any(), f"{lost}. Yours goes to the codes instead")
    need(to_z.any(), lost)
    moved = "z_q moves the codes. Only the codebook loss should, so detach what is added to z"
    need(not to_codes.any(), moved)
    compare(to_z, push, "the gradient of z_q should arrive at z unchanged, and yours")
    pulls = [gradients(loss, at) for loss in (*out[2:], *true[2:])]
    swapped = all(same(pulls[0][x], pulls[3][x]) and same(pulls[1][x], pulls[2][x]) for x in at)
    need(not swapped, "your losses are swapped. The codebook loss comes first, and moves the codes")
    names = {"codebook": ("codes", "z"), "commitment": ("z", "codes")}
    for pull, right, (what, (moves, rests)) in zip(pulls, pulls[2:], names.items()):
        word, loss = "them" if rests == "codes" else "it", f"your {what} loss"
        after = "Does it stand after the straight-through line, where z_q is z for the gradient?"
        need(pull[moves].any(), f"{loss} does not move the {moves}. {after}".replace("the z", "z"))
        need(not pull[rests].any(), f"{loss} moves {rests} as well. Detach {word} there")
        compare(pull[moves], right[moves], f"the gradient of {loss} at {moves}", (), 1e-5)


def check_adaptive_weight(f):
    """A decoder of one layer, whose weight has four axes, as a convolution's has. A GAN pulls hard,
    hardly at all, and hard but capped. Twice rec is longer or shorter, and what eq. 7 wants grows
    with it, or a cap of 1e4 and a δ on both sides would not show."""

    def norm_of(loss, last):
        return torch.autograd.grad(loss, last, retain_graph=True)[0].norm()

    cases = (99, 99, 1e4), (1, 1e-5, 1e9), (1, 1, 0.01), (1e-3, 1, 1e4), (100, 1e-5, 1e9)
    for size, pull, limit in cases:
        x, h = normal(6, 3), normal(6, 4, key=1).requires_grad_()
        last = nn.Parameter(normal(3, 2, 2, 1, key=2))
        x_hat = (h @ last.flatten(1).T).tanh()
        rec, adversarial = size * F.mse_loss(x_hat, x), -pull * x_hat.sin().mean()
        r, g = [norm_of(loss, last) for loss in (rec, adversarial)]
        right, cap = r / (g + 1e-4), torch.tensor(float(limit))
        out = f(rec, adversarial, last, limit)
        need(pair(out), "return two things, what eq. 7 wants and λ, which is capped")
        clean = last.grad is None and h.grad is None
        need(clean, "backward() leaves gradients in the networks. torch.autograd.grad does not")
        wanted, lam = [torch.as_tensor(x, dtype=torch.float32) for x in out]
        small = 1e-3 * float(right)
        swapped = same(wanted, cap, small) and same(lam, right, small) and cap < right
        need(not swapped, "your two results are swapped. What eq. 7 wants comes first")
        slips = {
            "the lengths are swapped. That of rec stands above": g / (r + 1e-4),
            "δ is added below the line only": (r + 1e-4) / (g + 1e-4),
            "δ is 1e-4 here, as in VQGAN's code, and yours is the paper's 1e-6": r / (g + 1e-6),
            "δ = 1e-4 is missing below the line, where it is added to the GAN's length": r / g,
            "take the ratio of the gradients, not of the losses": rec / (adversarial + 1e-4),
            "a length is the root of the sum of squares. You forgot the root": r**2 / (g**2 + 1e-4),
            "cap only λ. What eq. 7 wants may be larger": cap,
            "what eq. 7 wants has no cap of 1e4. Cap only λ, at limit": right.clamp(max=1e4),
        }
        compare(wanted, right, "what eq. 7 wants", slips, small)
        slips = {
            "you forgot the cap. λ is at most limit": right,
            "the cap is limit, whatever it is, and yours is 1e4": right.clamp(max=1e4),
            "limit is only the most that λ may be. Where eq. 7 wants less, λ is what it wants, and "
            "yours is limit": torch.maximum(right, cap),
        }
        compare(lam, torch.minimum(right, cap), "λ", slips, small)
        flows = wanted.requires_grad or lam.requires_grad
        need(not flows, "a gradient flows through your λ. Leave out create_graph, or detach")
        try:
            (rec + adversarial).backward()
        except RuntimeError:
            raise NotYet("the graph is gone. Say retain_graph=True in both calls") from None


@mock.patch("vqldm.mixed_precision", lambda x: nullcontext())  # or bf16 hides what is right
def check_d_step(f):
    """A D that holds an old gradient, and reconstructions that a decoder has made. D's numbers lie
    on both sides of 1 and of -1."""
    x = normal(4, 3, 16, 16)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        decoder = nn.Conv2d(3, 3, 3, padding=1)
        nets = [vqldm.PatchDiscriminator((16, 16)) for _ in range(5)]
    mine, true, stale, no_fake, no_real = nets
    mine.layers[-1].weight.data *= 2 / mine(x).std().detach()

    def weights(net):
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    for D in nets:
        D.load_state_dict(mine.state_dict())
        D(x).square().mean().backward()
    before, x_hat = weights(mine), decoder(x)
    real, fake = [true(some).detach() for some in (x, x_hat)]
    by = [torch.optim.SGD(D.parameters(), 0.01) for D in nets]
    d_loss = f(mine, by[0], x, x_hat)
    cut = "detach_() cuts x_hat itself off the decoder. detach() makes another tensor"
    need(x_hat.requires_grad, cut)
    right = OWN.d_step(true, by[1], x, x_hat)
    vqldm.hinge_loss(stale(x), stale(x_hat.detach())).backward()
    no_fake.zero_grad()
    F.relu(1 - no_fake(x)).mean().div(2).backward()
    no_real.zero_grad()
    F.relu(1 + no_real(x_hat.detach())).mean().div(2).backward()
    for optimizer in by[2:]:
        optimizer.step()
    need(decoder.weight.grad is None, "the gradient reaches the decoder. Detach x_hat first")
    linear, turned = (1 - real).mean() + (1 + fake).mean(), vqldm.hinge_loss(fake, real)
    slips = {
        "you forgot the half": 2 * right,
        "take the mean, not the sum": real.numel() * right,
        "max(0, …) is missing, or stands outside the mean. It belongs inside: what is above 1 or "
        "below -1 should cost nothing": linear / 2,
        "real and fake are swapped. D should give images high numbers": turned,
        "you forgot the images. Both means count": F.relu(1 + fake).mean() / 2,
        "you forgot the reconstructions. Both means count": F.relu(1 - real).mean() / 2,
    }
    slips = {message: wrong.detach() for message, wrong in slips.items()}
    said = single(torch.as_tensor(d_loss))
    compare(said, right.detach(), "the loss that you return", slips, 1e-4)
    slips = {
        "D has not learned. backward() makes gradients, and only step() uses them": before,
        "D still has the decoder's gradients. Call zero_grad() first": weights(stale),
        "D learns the wrong way round": 2 * before - weights(true),
        "reconstructions do not teach your D. Detach x_hat, not D(x_hat)": weights(no_fake),
        "images do not teach your D. Leave D(x) as it is": weights(no_real),
    }
    compare(weights(mine), weights(true), "a weight of D", slips, 1e-6)
    learns = all(p.requires_grad for p in mine.parameters())
    need(learns, "your D is left frozen, so it would not learn in the next step")


def check_faults(answer):
    """Which panel has which fault? Three letters, as in "ABC", "A, B, C" or a list."""
    text = str(answer).upper()
    together = re.findall(r"\b[A-E]{3}\b", text)
    letters = list(together[-1]) if together else re.findall(r"\b[A-E]\b", text)
    need(len(letters) == 3, "answer with three letters")
    look = "How large are the blobs, how long the arms, and what std has the whole?"
    ok = zlib.crc32("".join(letters).encode()) == 1670073319
    need(ok, f"not all three are right. {look}")


def check_noisy_sample(f):
    """The walk of chapter 4 for eta = 0, and then two strengths of fresh noise."""

    def itself(*given):
        raise NotYet("your noisy_sample calls sample. Copy its lines, and change them")

    with mock.patch.object(vqldm.Diffusion, "sample", itself):
        check_sample(f)
        for eta, steps, schedule in ((0.6, 4, "cosine"), (1, 5, "linear"), (1, 3, "cosine")):
            check_noise(f, eta, steps, vqldm.Diffusion(200, schedule))


def check_noise(f, eta, steps, diffusion):
    """Each step of a walk with fresh noise."""
    drawn, start = [normal(3, 2, 2, 3, key=("fresh", i)) for i in range(steps)], normal(3, 2, 2, 3)

    def net(z, t):
        return (z * 2).sin() + t.view(-1, 1, 1, 1) / 200

    def draw_from(some):
        def noise():
            need(some, f"noise() draws n once in each step, and you call it over {steps} times")
            return some.pop(0)

        return noise

    left = [n.clone() for n in drawn]
    found = list(f(diffusion, net, start.clone(), steps, eta, draw_from(left)))
    true = list(OWN.noisy_sample(diffusion, net, start, steps, eta, draw_from([*drawn])))
    need(len(left) < steps, "you never call noise(). It draws n, and draw no other noise")
    ok = len(found) == steps and all(pair(two) for two in found)
    need(ok, "yield a pair, z and z0_hat, after each step, with fresh noise too")
    before = [start] + [z for z, _ in true]
    for i, (t, t_prev) in enumerate(diffusion.pairs(steps)):
        level = torch.full((3,), t)
        z0_hat, eps_hat = OWN.predict(diffusion, net(before[i], level), before[i], level)
        abar, abar_prev, below = [float(diffusion.alpha_bar[j]) for j in (t, t_prev, t - 1)]
        noise, ddpm = 1 - abar_prev, 1 - abar / abar_prev
        sigma2, one_level = ddpm * noise / (1 - abar), (1 - abar / below) * noise / (1 - abar)
        fresh = eta**2 * sigma2

        def like(old, factor):
            return abar_prev**0.5 * z0_hat + max(0, old) ** 0.5 * eps_hat + factor * drawn[i]

        when = f"at eta = {eta}, after step {i + 1} of {steps}"
        compare(found[i][1], true[i][1], f"{when} your z0_hat")
        mine = found[i][0]
        lacks = "your σ² is Algorithm 2's, 1 - ᾱ/ᾱ_prev, and lacks the factor (1 - ᾱ_prev)/(1 - ᾱ)"
        without = like(noise - sigma2, sigma2**0.5)
        spans = "a step spans many levels, so α is ᾱ/ᾱ_prev, not that of one level"
        dial = "the fresh variance is η²σ², and yours is ησ². η multiplies the std σ"
        slips = {
            "n is not added": like(noise - fresh, 0),
            "the old noise should give way, to 1 - ᾱ_prev - η²σ²": like(noise, fresh**0.5),
            "too much noise is fresh. It should be η²σ², and η is missing": without,
            "all of the noise is fresh in yours. Only η²σ² should be": like(0, noise**0.5),
            "n is multiplied by a variance. Take the root": like(noise - fresh, fresh),
            lacks: like(noise - eta**2 * ddpm, eta * ddpm**0.5),
            dial: like(noise - eta * sigma2, (eta * sigma2) ** 0.5),
            spans: like(noise - eta**2 * one_level, eta * one_level**0.5),
        }
        compare(mine, true[i][0], f"{when} your z", slips, 5e-3)


def check_forward(f):
    """A ResBlock of stage 1, and two of the UNet."""
    for c_in, c_out, emb_dim in ((8, 16, None), (8, 8, 12), (8, 12, 12)):
        block = vqldm.ResBlock(c_in, c_out, emb_dim).requires_grad_(False)
        x, emb = normal(2, c_in, 5, 6), emb_dim and normal(2, emb_dim)
        for i, p in enumerate(block.parameters()):
            p.copy_(0.3 * normal(*p.shape, key=("shaken", i)))  # no layer is zero any more
        true, inner = OWN.forward(block, x, emb), block.norm2(block.conv1(F.silu(block.norm1(x))))

        def scaled(scale=0, shift=0):
            return block.shortcut(x) + block.conv2(F.silu(inner * (1 + scale) + shift))

        slips = {"you forgot to add shortcut(x)": true - block.shortcut(x)}
        if emb_dim:
            scale, shift = block.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)
            late = block.shortcut(x) + block.conv2(F.silu(inner) * (1 + scale) + shift)
            linear = block.emb(emb)[:, :, None, None].chunk(2, 1)
            slips |= {
                "you do not use emb": scaled(),
                "y is multiplied by 1 + scale, and yours by scale alone": scaled(scale - 1, shift),
                "scale and shift are swapped": scaled(shift, scale),
                "scale and shift come before SiLU": late,
                "emb goes through SiLU before the linear layer": scaled(*linear),
            }
        kind = f"with {c_in} channels in, {c_out} out, {'and' if emb_dim else 'no'} emb"
        compare(f(block, x, emb), true, f"{kind}, your output", slips)
        given = dict(block.requires_grad_(True).named_parameters())
        given |= {"x": x.requires_grad_()} | ({"emb": emb.requires_grad_()} if emb_dim else {})
        pulls = [gradients(way(block, x, emb).sin(), given) for way in (f, OWN.forward)]
        for name in given:
            reached = same(pulls[0][name], pulls[1][name])
            need(reached, f"the gradient at {name} is wrong or lost. Leave out detach and no_grad")


def check_attend(f):
    """Three grids of seven cells, with five channels each."""
    q, k, v = (normal(3, 7, 5, key=i) for i in range(3))
    out, fit = f(q, k, v), q @ k.transpose(1, 2)
    (true, weights), fit_ = OWN.attend(q, k, v), fit / 5**0.5
    need(pair(out), "return two things, what the cells receive and the weights")
    swapped = same(out[0], weights) and same(out[1], true)
    need(not swapped, "your two outputs are swapped")
    slips = {
        "you forgot to divide by √C": fit.softmax(2),
        "divide by √C, not by C": (fit / 5).softmax(2),
        "C is the number of channels. You took that of the cells": (fit / 7**0.5).softmax(2),
        "your weights sum to 1 over the queries, not over the keys, dim=2": fit_.softmax(1),
        "these are no weights yet. Softmax makes them positive, with sum 1": fit_,
        "your rows belong to keys, and should to queries": fit_.transpose(1, 2).softmax(2),
    }
    compare(out[1], weights, "your matrix of weights", slips)
    slips = {
        "take the mean of the values. You took that of the keys": weights @ k,
        "a query's weights stand in a row, weights @ v": weights.transpose(1, 2) @ v,
    }
    compare(out[0], true, "what your cells receive", slips)


# What the last exercise leaves out. No peeping.
def leave_out(model, k):
    return model.vqgan.codebook.lookup(k)


strange_fault = mock.patch.object(vqldm.LatentDiffusion, veil(r"wl\obwfmwp"), leave_out)


def check_silenced(answer):
    """Which function of the program was left out? Its name, or the function itself."""
    name = getattr(answer, "__name__", str(answer)).split(".")[-1].split("(")[0].strip().lower()
    places = vqldm, vqldm.LatentDiffusion, vqldm.Diffusion, vqldm.Codebook
    known = any(hasattr(place, name) for place in places)
    need(known, f"vqldm has no function that is called {name}")
    ask = "What makes the loss so small? Ask what stage 2 is fed with"
    need(zlib.crc32(name.encode()) == 1559634821, f"{name} does all that it should. {ask}")
