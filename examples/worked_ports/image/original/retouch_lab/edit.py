import torch


def read(text):
    return torch.tensor([(list(text.encode()) + [0] * 64)[:64]])


def edit(editor, codec, noise, photo, order, steps=20, cfg=4.0):
    """photo is uint8 [H, W, 3]; the result is [1, 3, H, W] in [-1, 1]."""
    picture = codec.encode((photo.permute(2, 0, 1)[None] / 255.0) * 2 - 1)
    z, told, untold = noise, read(order), read("")
    for i in range(steps):
        t = torch.full((1,), 1 - i / steps)
        base = editor(z, picture, t, untold)
        z = z - (base + cfg * (editor(z, picture, t, told) - base)) / steps
    return codec(z)
