"""The Triton kernels in torch, program by program, tile by tile: for sizes no interpreter reaches.

A twin takes the keyword arguments that the launchers give to its kernel, grid included, and the
same tiles, splits, slabs and order of sums. What it leaves out are addresses and masks, which the
interpreter has checked. It multiplies in float32 what the kernel multiplies.
"""

from __future__ import annotations

import torch


class Twin:
    """Stands in for a kernel: runs a function for every program of the grid."""

    def __init__(self, program):
        self.program = program
        self.launches = []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launches.append(grid[0])
            for number in range(grid[0]):
                self.program(number, **arguments)

        return launch


def cdiv(size, block):
    return -(-size // block)


def block_pair(number, num_first, num_second, group):
    begin = number // (group * num_second) * group
    size, within = min(num_first - begin, group), number % (group * num_second)
    return begin + within % size, within // size


def logits_tile(hidden, weight, bias, rows, columns, softcap, scale, block_d):
    hidden, weight = hidden[rows].float(), weight[columns].float()
    logits = torch.zeros(hidden.shape[0], weight.shape[0])
    for begin in range(0, hidden.shape[1], block_d):
        step = slice(begin, begin + block_d)
        logits.addmm_(hidden[:, step], weight[:, step].T)
    if bias is not None:
        logits += bias[columns].float()
    logits *= scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def place(target, columns):
    """Rows whose target is among the columns, and where."""
    inside = ((target >= columns.start) & (target < columns.stop)).nonzero().squeeze(1)
    return inside, target[inside] - columns.start


def forward(number, *, hidden_ptr, weight_ptr, bias_ptr, target_ptr, partial_ptr, **k):
    n, v, num_splits = k["num_tokens"], k["num_vocab"], k["num_splits"]
    row_block, split = block_pair(number, cdiv(n, k["BLOCK_N"]), num_splits, k["GROUP"])
    rows = slice(row_block * k["BLOCK_N"], min((row_block + 1) * k["BLOCK_N"], n))
    width = cdiv(cdiv(v, k["BLOCK_V"]), num_splits) * k["BLOCK_V"]
    maximum = torch.full((rows.stop - rows.start,), -torch.inf)
    total, target_logit = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for column in range(split * width, min((split + 1) * width, v), k["BLOCK_V"]):
        columns = slice(column, min(column + k["BLOCK_V"], v))
        logits = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, rows, columns, k["softcap"], k["scale"], k["BLOCK_D"]
        )
        inside, column_of = place(target_ptr[rows], columns)
        target_logit[inside] += logits[inside, column_of]
        higher = torch.maximum(maximum, logits.amax(1))
        exponential = (logits - higher[:, None]).exp()
        total = total * (maximum - higher).exp() + exponential.sum(1)
        maximum = higher
    partial_ptr[:, split, rows] = torch.stack((maximum, total, target_logit))


def merge(number, *, partial_ptr, logp_ptr, lse_ptr, num_tokens, num_splits, BLOCK_N, **_):
    rows = slice(number * BLOCK_N, min((number + 1) * BLOCK_N, num_tokens))
    maximum = partial_ptr[0, :, rows].amax(0)
    total, target_logit = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for split in range(num_splits):
        found, added, target = partial_ptr[:, split, rows]
        total += added * (found - maximum).exp()
        target_logit += target
    logp_ptr[rows] = (target_logit - maximum) - total.log()
    lse_ptr[rows] = maximum + total.log()


def gather(number, *, hidden_ptr, row_ptr, count_ptr, gathered_ptr, **_):
    if number == 0:
        gathered_ptr.fill_(torch.nan)
        gathered_ptr[: int(count_ptr)] = hidden_ptr[row_ptr[: int(count_ptr)]]


def scatter(number, *, sum_ptr, row_ptr, count_ptr, dhidden_ptr, **_):
    if number == 0:
        kept = sum_ptr[: int(count_ptr)]
        dhidden_ptr[row_ptr[: int(count_ptr)]] = kept.to(dhidden_ptr.dtype)


def dlogits(number, *, hidden_ptr, weight_ptr, bias_ptr, target_ptr, number_ptr, **k):
    n, w = hidden_ptr.shape[0], k["num_columns"]
    blocks_n, blocks_v = k["height_ptr"].shape
    assert blocks_v == cdiv(w, k["BLOCK_V"])
    row_block, column_block = block_pair(number, blocks_n, blocks_v, k["GROUP"])
    height = int(k["height_ptr"][row_block, column_block])
    rows = slice(row_block * k["BLOCK_N"], row_block * k["BLOCK_N"] + height)
    columns = slice(column_block * k["BLOCK_V"], min((column_block + 1) * k["BLOCK_V"], w))
    if height <= 0:
        if k["dbias_ptr"] is not None:
            k["dbias_ptr"][row_block, columns] = 0.0
        return
    logits = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, rows, columns, k["softcap"], k["scale"], k["BLOCK_D"]
    )
    lse, grad, target_grad = number_ptr[rows].unbind(1)
    dz = -grad[:, None] * (logits - lse[:, None]).exp()
    inside, column_of = place(target_ptr[rows], columns)
    dz[inside, column_of] = target_grad[inside]
    if k["softcap"] is not None:
        dz *= 1.0 - (logits / k["softcap"]) ** 2
    dz *= k["scale"]
    k["dz_ptr"].view(n, -1)[rows, columns] = dz.to(k["dz_ptr"].dtype)
    if k["dbias_ptr"] is not None:
        k["dbias_ptr"][row_block, columns] = dz.sum(0)


def dhidden(number, *, dz_ptr, weight_ptr, count_ptr, sum_ptr, first_column, **k):
    n, w, d, count = k["num_tokens"], k["num_columns"], k["num_hidden"], int(count_ptr)
    blocks_n, blocks_d = cdiv(n, k["BLOCK_N"]), cdiv(d, k["BLOCK_D"])
    row_block, hidden_block = block_pair(number, blocks_n, blocks_d, k["GROUP"])
    rows = slice(row_block * k["BLOCK_N"], min((row_block + 1) * k["BLOCK_N"], count))
    hidden = slice(hidden_block * k["BLOCK_D"], min((hidden_block + 1) * k["BLOCK_D"], d))
    if rows.start >= count:
        return
    dz = dz_ptr.view(n, -1)[rows, :w].float()
    total = sum_ptr[rows, hidden].clone() if first_column > 0 else torch.zeros(1)
    total = total.expand(dz.shape[0], hidden.stop - hidden.start).clone()
    for begin in range(0, w, k["BLOCK_V"]):
        step = slice(begin, begin + k["BLOCK_V"])
        total.addmm_(dz[:, step], weight_ptr[step, hidden].float())
    sum_ptr[rows, hidden] = total


def dweight(number, *, dz_ptr, hidden_ptr, count_ptr, dweight_ptr, **k):
    n, w, d, count = k["num_tokens"], k["num_columns"], k["num_hidden"], int(count_ptr)
    blocks_v, blocks_d = cdiv(w, k["BLOCK_V"]), cdiv(d, k["BLOCK_D"])
    column_block, hidden_block = block_pair(number, blocks_v, blocks_d, k["GROUP"])
    columns = slice(column_block * k["BLOCK_V"], min((column_block + 1) * k["BLOCK_V"], w))
    hidden = slice(hidden_block * k["BLOCK_D"], min((hidden_block + 1) * k["BLOCK_D"], d))
    dz = dz_ptr.view(n, -1)[:count, columns].float()
    total = torch.zeros(dz.shape[1], hidden.stop - hidden.start)
    for begin in range(0, count, k["BLOCK_N"]):
        step = slice(begin, min(begin + k["BLOCK_N"], count))
        total.addmm_(dz[step].T, hidden_ptr[step, hidden].float())
    dweight_ptr[columns, hidden] = total.to(dweight_ptr.dtype)
