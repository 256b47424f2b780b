"""Input x gradient (Shrikumar et al., 2016) through backbone and head."""

import torch


def input_x_gradient(backbone, feature, heads, images, targets):
    """Explain logits from the pixels; one forward pass serves all heads and classes.

    images: normalised float32 [B, 3, S, S]. feature: the spatial feature that the heads see.
    targets: [(image, head, class)] as indices. Returns float32 [len(targets), S, S]: the sum over
    channels of input times gradient.
    """
    inputs = images.detach().requires_grad_()
    with torch.enable_grad():
        maps = backbone(inputs, [feature])[str(feature)]
        logits = [head(maps) for head in heads]
    # A backward pass explains one target of every image, for images do not touch one another.
    rounds, turn = [], {}
    for number, (image, _, _) in enumerate(targets):
        turn[image] = turn.get(image, -1) + 1
        if turn[image] == len(rounds):
            rounds.append([])
        rounds[turn[image]].append(number)
    result = torch.empty(len(targets), *images.shape[2:], device=images.device)
    for numbers in rounds:
        total = sum(logits[h][i, c] for i, h, c in (targets[n] for n in numbers))
        (gradient,) = torch.autograd.grad(total, inputs, retain_graph=numbers is not rounds[-1])
        product = (inputs.detach() * gradient).sum(1)
        result[numbers] = product[[targets[n][0] for n in numbers]]
    return result
