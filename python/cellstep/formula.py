"""The layer as a formula on torch's own operators: every option, every dtype and device, differentiable any way.

It is the reference that the kernels are held against, what their backward pass differentiates where it is not
written out, and what runs where they cannot: under ``vmap`` and forward-mode AD, on other devices, and in a
TorchScript file that is to need no operator library.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional

#: Activations by name; the place is the code that operators and deploy files use.
ACTIVATIONS = ["linear", "relu", "sigmoid", "tanh", "hard_sigmoid", "hardsigmoid", "elu", "softmax"]

#: Of gates, candidate and output in the LSTM as torch has it.
PLAIN_ACTIVATIONS = (2, 3, 3)

#: What layer normalisation adds to a variance, as torch.nn.LayerNorm does.
NORM_EPS = 1e-5


def activate(x: Tensor, activation: int) -> Tensor:
    """Apply an activation by its place in :data:`ACTIVATIONS`; softmax runs over the last axis."""
    if activation == 3:
        return torch.tanh(x)
    if activation == 2:
        return torch.sigmoid(x)
    if activation == 1:
        return torch.relu(x)
    if activation == 4:  # Keras 2, and ONNX with its default alpha and beta
        return torch.clamp(0.2 * x + 0.5, 0.0, 1.0)
    if activation == 5:  # torch and Keras 3
        return torch.clamp(x + 3.0, 0.0, 6.0) / 6.0
    if activation == 6:  # Clevert, Unterthiner and Hochreiter 2016, with alpha = 1
        return functional.elu(x)
    if activation == 7:
        return torch.softmax(x, -1)
    return x


def _normalised(x: Tensor, gain: Optional[Tensor], shift: Optional[Tensor]) -> Tensor:
    if gain is None:
        return x if shift is None else x + shift
    return functional.layer_norm(x, [x.size(-1)], gain, shift, 1e-5)


def lstm_steps(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional[Tensor],
    bias_hh: Optional[Tensor],
    weight_hr: Optional[Tensor],
    weight_peephole: Optional[Tensor],
    norm_ih: Optional[Tensor],
    norm_hh: Optional[Tensor],
    norm_c: Optional[Tensor],
    norm_c_bias: Optional[Tensor],
    reset: Optional[Tensor],
    initial_h: Optional[Tensor],
    initial_c: Optional[Tensor],
    mask_h: Optional[Tensor],
    mask_g: Optional[Tensor],
    keep_h: Optional[Tensor],
    keep_c: Optional[Tensor],
    coupled: bool,
    cell_clip: float,
    zoneout_h: float,
    zoneout_c: float,
    gate_activation: int,
    activation: int,
    output_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer in one direction, step by step.

    With LN the layer normalisation of Ba, Kiros and Hinton 2016 (identity without ``norm_*``), G gates (4: i, f, g,
    o; ``coupled``, 3: i, g, o with f = 1 - i, Greff et al. 2017), peepholes p (Gers and Schmidhuber 2000):

        a = LN(W_ih x) + b_ih + LN(W_hh (mask_h h)) + b_hh
        i = gate(a_i + p_i c),  f = gate(a_f + p_f c),  g = mask_g act(a_g)
        c' = clip(f c + i g),   o = gate(a_o + p_o c'),  h' = W_hr (o out(LN(c')))

    and then zoneout (Krueger et al. 2016): c'' = k_c c + (1 - k_c) c', h'' = k_h h + (1 - k_h) h', with k the masks
    ``keep_*`` in training and the probabilities ``zoneout_*`` in their place for inference.

    Args:
        x: (T, N, I). h: (N, R), R = H or the rows of ``weight_hr``. c: (N, H).
        weight_ih: (G H, I). weight_hh: (G H, R). bias_*: (G H). weight_hr: (R, H).
        weight_peephole: (3 H) rows i, f, o; coupled (2 H) rows i, o. norm_ih, norm_hh: (G H). norm_c*: (H).
        reset: (T, N) bool: rows to put to ``initial_h`` (R), ``initial_c`` (H), or to zero, before the step.
        mask_h: (N, R). mask_g: (N, H). keep_h: (T, N, R). keep_c: (T, N, H).

    Returns:
        y (T, N, R), h (N, R), c (N, H), and c of every step (T, N, H).
    """
    hidden = c.size(1)
    # Not sliced step by step, whose gradients would each be as large as the whole.
    projected = _normalised(functional.linear(x, weight_ih), norm_ih, bias_ih).unbind(0)
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    for step in range(x.size(0)):
        if reset is not None:
            cleared = reset[step].unsqueeze(1)
            h = torch.where(cleared, torch.zeros_like(h) if initial_h is None else initial_h.to(h.dtype), h)
            c = torch.where(cleared, torch.zeros_like(c) if initial_c is None else initial_c.to(c.dtype), c)
        h_in = h if mask_h is None else h * mask_h
        sums = projected[step] + _normalised(functional.linear(h_in, weight_hh), norm_hh, bias_hh)
        at_i = sums[:, :hidden]
        at_o = sums[:, sums.size(1) - hidden :]
        at_g = sums[:, sums.size(1) - 2 * hidden : sums.size(1) - hidden]
        if weight_peephole is not None:
            at_i = at_i + weight_peephole[:hidden] * c
        i = activate(at_i, gate_activation)
        if coupled:
            f = 1.0 - i
        else:
            at_f = sums[:, hidden : 2 * hidden]
            if weight_peephole is not None:
                at_f = at_f + weight_peephole[hidden : 2 * hidden] * c
            f = activate(at_f, gate_activation)
        g = activate(at_g, activation)
        if mask_g is not None:
            g = g * mask_g
        new_c = f * c + i * g
        if cell_clip > 0.0:
            new_c = torch.clamp(new_c, -cell_clip, cell_clip)
        if weight_peephole is not None:
            at_o = at_o + weight_peephole[weight_peephole.size(0) - hidden :] * new_c
        new_h = activate(at_o, gate_activation) * activate(_normalised(new_c, norm_c, norm_c_bias), output_activation)
        if weight_hr is not None:
            new_h = functional.linear(new_h, weight_hr)
        if keep_c is not None:
            new_c = keep_c[step] * c + (1.0 - keep_c[step]) * new_c
        elif zoneout_c > 0.0:
            new_c = zoneout_c * c + (1.0 - zoneout_c) * new_c
        if keep_h is not None:
            new_h = keep_h[step] * h + (1.0 - keep_h[step]) * new_h
        elif zoneout_h > 0.0:
            new_h = zoneout_h * h + (1.0 - zoneout_h) * new_h
        h, c = new_h, new_c
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs), h, c, torch.stack(cells)


def lstm_packed_steps(
    x: Tensor,
    batch_sizes: Optional[Tensor],
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional[Tensor],
    bias_hh: Optional[Tensor],
    weight_hr: Optional[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A plain layer over packed sequences, step by step.

    Args:
        x: (P, I), the rows of the first step, then those of the second and so on. batch_sizes: (T) rows of each step,
            not rising; without it every step has all N.
        h: (N, R). c: (N, H). The weights are those of :func:`lstm_steps`.
        reverse: from the last step to the first.

    Returns:
        y (P, R), h (N, R) and c (N, H) behind each row's last step, and c of every step (P, H).
    """
    rows = h.size(0)
    sizes = [rows] * (x.size(0) // max(rows, 1)) if batch_sizes is None else batch_sizes.tolist()
    steps = list(x.split(sizes))
    outputs, cells = [x.new_empty(0, h.size(1))], [x.new_empty(0, c.size(1))]
    for step in reversed(steps) if reverse else steps:
        n = step.size(0)
        gates = functional.linear(step, weight_ih, bias_ih) + functional.linear(h[:n], weight_hh, bias_hh)
        i, f, g, o = gates.chunk(4, 1)
        new_c = torch.sigmoid(f) * c[:n] + torch.sigmoid(i) * torch.tanh(g)
        new_h = torch.sigmoid(o) * torch.tanh(new_c)
        if weight_hr is not None:
            new_h = functional.linear(new_h, weight_hr)
        h, c = torch.cat([new_h, h[n:]]), torch.cat([new_c, c[n:]])
        outputs.append(new_h)
        cells.append(new_c)
    if reverse:
        outputs, cells = outputs[::-1], cells[::-1]
    return torch.cat(outputs), h, c, torch.cat(cells)


def lstm_layers_steps(
    x: Tensor,
    batch_sizes: Optional[Tensor],
    lengths: Optional[Tensor],
    reset: Optional[Tensor],
    h: Tensor,
    c: Tensor,
    initial_h: Optional[Tensor],
    initial_c: Optional[Tensor],
    weights: list[Tensor],
    biased: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stack of plain layers, step by step; the arguments are those of ``torch.ops.cellstep.lstm_layers``.

    Returns:
        y (T, N, D H) or (P, D H), h and c (L D, N, H) behind each row's last step, and c of every step of the last
        layer (D, P, H).
    """
    directions, count = 2 if bidirectional else 1, 4 if biased else 2
    last_h: list[Tensor] = []
    last_c: list[Tensor] = []
    cells: list[Tensor] = []
    if lengths is not None:
        # What lies past the end of a row may be anything. A NaN there would meet the gradient, zero or not.
        there = torch.arange(x.size(0), device=x.device).unsqueeze(1) < lengths
        x = x.masked_fill(~there.unsqueeze(2), 0.0)
    for layer in range(len(weights) // (count * directions)):
        outputs, cells = [], []
        for direction in range(directions):
            stage = layer * directions + direction
            weight_ih, weight_hh = weights[stage * count : stage * count + 2]
            bias_ih, bias_hh = weights[stage * count + 2 : stage * count + 4] if biased else (None, None)
            own = h[stage], c[stage], weight_ih, weight_hh, bias_ih, bias_hh
            if x.dim() == 2:
                y, h_n, c_n, every = lstm_packed_steps(x, batch_sizes, *own, None, direction == 1)
            else:
                first = None if initial_h is None else initial_h[stage]
                second = None if initial_c is None else initial_c[stage]
                ragged = None if lengths is None else there
                y, h_n, c_n, every = _ragged_steps(x, ragged, reset, first, second, *own, direction == 1)
            outputs.append(y)
            cells.append(every.flatten(0, -2))
            last_h.append(h_n)
            last_c.append(c_n)
        x = torch.cat(outputs, -1)
    return x, torch.stack(last_h), torch.stack(last_c), torch.stack(cells)


def _ragged_steps(
    x: Tensor,
    there: Optional[Tensor],
    reset: Optional[Tensor],
    initial_h: Optional[Tensor],
    initial_c: Optional[Tensor],
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional[Tensor],
    bias_hh: Optional[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A plain layer over rows of any lengths. ``there`` (T, N) bool: the steps that a row has; in the others its state
    stands still and its output is zero. Resets part the same pairs of steps in both directions."""
    steps = x.size(0)
    outputs, cells = [x] * steps, [x] * steps
    for step in reversed(range(steps)) if reverse else range(steps):
        mark = step + 1 if reverse else step
        if reset is not None and mark < steps:
            cleared = reset[mark] if there is None else reset[mark] & there[mark]
            cleared = cleared.unsqueeze(1)
            h = torch.where(cleared, torch.zeros_like(h) if initial_h is None else initial_h, h)
            c = torch.where(cleared, torch.zeros_like(c) if initial_c is None else initial_c, c)
        sums = functional.linear(x[step], weight_ih, bias_ih) + functional.linear(h, weight_hh, bias_hh)
        i, f, g, o = sums.chunk(4, 1)
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new_h = torch.sigmoid(o) * torch.tanh(new_c)
        outputs[step], cells[step] = new_h, new_c
        if there is not None:
            active = there[step].unsqueeze(1)
            outputs[step], cells[step] = new_h.masked_fill(~active, 0.0), new_c.masked_fill(~active, 0.0)
            new_h, new_c = torch.where(active, new_h, h), torch.where(active, new_c, c)
        h, c = new_h, new_c
    return torch.stack(outputs), h, c, torch.stack(cells)


def _slope(y: Tensor, activation: int) -> Tensor:
    """Derivative of an elementwise activation in terms of its value."""
    if activation == 3:
        return 1.0 - y * y
    if activation == 2:
        return y * (1.0 - y)
    if activation == 1:
        return (y > 0).to(y.dtype)
    if activation == 4:
        return 0.2 * ((y > 0) & (y < 1)).to(y.dtype)
    if activation == 5:
        return ((y > 0) & (y < 1)).to(y.dtype) / 6.0
    if activation == 6:
        return torch.where(y > 0, torch.ones_like(y), y + 1.0)
    return torch.ones_like(y)


def activate_backward(grad: Tensor, y: Tensor, activation: int) -> Tensor:
    """Gradient of :func:`activate` from its value y."""
    if activation == 7:
        return y * (grad - (grad * y).sum(-1, keepdim=True))
    return grad * _slope(y, activation)


def _norm_backward(grad: Tensor, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of LN(x) gain with respect to x and to the gain."""
    mean = x.mean(-1, keepdim=True)
    inverse = (x.var(-1, correction=0, keepdim=True) + NORM_EPS).rsqrt()
    x = (x - mean) * inverse
    scaled = grad * gain
    to_x = inverse * (scaled - scaled.mean(-1, keepdim=True) - x * (scaled * x).mean(-1, keepdim=True))
    return to_x, (grad * x).flatten(0, -2).sum(0)


def lstm_steps_backward(
    grad_y: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    grad_cells: Optional[Tensor],
    y: Tensor,
    cells: Tensor,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional[Tensor],
    bias_hh: Optional[Tensor],
    weight_hr: Optional[Tensor],
    weight_peephole: Optional[Tensor],
    norm_ih: Optional[Tensor],
    norm_hh: Optional[Tensor],
    norm_c: Optional[Tensor],
    norm_c_bias: Optional[Tensor],
    reset: Optional[Tensor],
    initial_h: Optional[Tensor],
    initial_c: Optional[Tensor],
    mask_h: Optional[Tensor],
    mask_g: Optional[Tensor],
    keep_h: Optional[Tensor],
    keep_c: Optional[Tensor],
    coupled: bool,
    cell_clip: float,
    zoneout_h: float,
    zoneout_c: float,
    gate_activation: int,
    activation: int,
    output_activation: int,
) -> dict[str, Tensor]:
    """Gradients of :func:`lstm_steps` by the names of its arguments; the masks have none.

    ``y`` and ``cells`` are what the forward pass gave: with them everything but the way back of h and c is computed
    for all steps at once.
    """
    steps, hidden = x.size(0), c.size(1)
    h_before, c_before = torch.cat([h.unsqueeze(0), y[:-1]]), torch.cat([c.unsqueeze(0), cells[:-1]])
    if reset is not None:
        cleared = reset.unsqueeze(2)
        h_before = torch.where(cleared, h_before.new_zeros([]) if initial_h is None else initial_h, h_before)
        c_before = torch.where(cleared, c_before.new_zeros([]) if initial_c is None else initial_c, c_before)
    h_in = h_before if mask_h is None else h_before * mask_h
    input_sums, hidden_sums = functional.linear(x, weight_ih), functional.linear(h_in, weight_hh)
    sums = _normalised(input_sums, norm_ih, bias_ih) + _normalised(hidden_sums, norm_hh, bias_hh)
    parts = list(sums.split(hidden, 2))
    p_i = p_f = p_o = sums.new_zeros([])
    if weight_peephole is not None:
        peepholes = weight_peephole.split(hidden)
        p_i, p_o = peepholes[0], peepholes[-1]
        p_f = p_i if coupled else peepholes[1]
    i = activate(parts[0] + p_i * c_before, gate_activation)
    f = 1.0 - i if coupled else activate(parts[1] + p_f * c_before, gate_activation)
    g = activate(parts[-2], activation)
    g_in = g if mask_g is None else g * mask_g
    raw_c = f * c_before + i * g_in
    new_c = torch.clamp(raw_c, -cell_clip, cell_clip) if cell_clip > 0.0 else raw_c
    o = activate(parts[-1] + p_o * new_c, gate_activation)
    out = activate(_normalised(new_c, norm_c, norm_c_bias), output_activation)

    i_slope, f_slope, o_slope = (_slope(gate, gate_activation) for gate in (i, f, o))
    g_slope = _slope(g, activation) if mask_g is None else _slope(g, activation) * mask_g
    to_out = o * _slope(out, output_activation)
    inside = (raw_c.abs() <= cell_clip).to(x.dtype) if cell_clip > 0.0 else None
    to_sums, to_hidden_sums, to_new_h = [], [], []
    found: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        found[name] = found[name] + value if name in found else value

    for step in range(steps - 1, -1, -1):
        grad_h = grad_h + grad_y[step]
        if grad_cells is not None:
            grad_c = grad_c + grad_cells[step]
        h_share: Tensor | float = zoneout_h if keep_h is None else keep_h[step]
        c_share: Tensor | float = zoneout_c if keep_c is None else keep_c[step]
        new_h_grad, h_grad = (1.0 - h_share) * grad_h, h_share * grad_h
        c_grad = c_share * grad_c
        m_grad = new_h_grad if weight_hr is None else new_h_grad @ weight_hr
        v_grad = m_grad * to_out[step]
        if norm_c is not None:
            add("norm_c_bias", v_grad.sum(0))
            v_grad, gain = _norm_backward(v_grad, new_c[step], norm_c)
            add("norm_c", gain)
        o_sum = m_grad * out[step] * o_slope[step]
        raw_grad = (1.0 - c_share) * grad_c + v_grad + o_sum * p_o
        if inside is not None:
            raw_grad = raw_grad * inside[step]
        f_grad = raw_grad * c_before[step]
        i_grad = raw_grad * g_in[step]
        c_grad = c_grad + raw_grad * f[step]
        if coupled:
            gates = [(i_grad - f_grad) * i_slope[step]]
        else:
            gates = [i_grad * i_slope[step], f_grad * f_slope[step]]
            c_grad = c_grad + gates[1] * p_f
        c_grad = c_grad + gates[0] * p_i
        sum_grad = torch.cat([*gates, raw_grad * i[step] * g_slope[step], o_sum], 1)
        hidden_grad = sum_grad
        if norm_hh is not None:
            hidden_grad, gain = _norm_backward(sum_grad, hidden_sums[step], norm_hh)
            add("norm_hh", gain)
        back = hidden_grad @ weight_hh
        h_grad = h_grad + (back if mask_h is None else back * mask_h)
        if reset is not None:
            rows = reset[step].unsqueeze(1)
            if initial_h is not None:
                add("initial_h", (h_grad * rows).sum(0))
            if initial_c is not None:
                add("initial_c", (c_grad * rows).sum(0))
            h_grad, c_grad = h_grad.masked_fill(rows, 0.0), c_grad.masked_fill(rows, 0.0)
        grad_h, grad_c = h_grad, c_grad
        to_new_h.append(new_h_grad)
        to_sums.append(sum_grad)
        to_hidden_sums.append(hidden_grad)

    all_sums = torch.stack(to_sums[::-1])
    all_hidden = torch.stack(to_hidden_sums[::-1])
    from_sums = all_sums
    if norm_ih is not None:
        from_sums, found["norm_ih"] = _norm_backward(all_sums, input_sums, norm_ih)
    found["x"] = from_sums @ weight_ih
    found["h"], found["c"] = grad_h, grad_c
    found["weight_ih"] = from_sums.flatten(0, 1).t() @ x.flatten(0, 1)
    found["weight_hh"] = all_hidden.flatten(0, 1).t() @ h_in.flatten(0, 1)
    found["bias_ih"] = found["bias_hh"] = all_sums.sum((0, 1))
    if weight_hr is not None:
        found["weight_hr"] = torch.stack(to_new_h[::-1]).flatten(0, 1).t() @ (o * out).flatten(0, 1)
    if weight_peephole is not None:
        by_gate = all_sums.split(hidden, 2)
        seen = [(by_gate[0] * c_before).sum((0, 1))]
        if not coupled:
            seen.append((by_gate[1] * c_before).sum((0, 1)))
        found["weight_peephole"] = torch.cat([*seen, (by_gate[-1] * new_c).sum((0, 1))])
    return found
