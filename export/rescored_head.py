"""The output head in two looks: logits of all words by a rough product, then those of the best
once more in float32, over the embedding that is in memory anyway (the two are tied)."""

from torch import Tensor, nn

from handler.beam_search import greatest

# The heirs that a search of 8 beams may take of one of them. Beyond these, what is rough decides
# only the sum that probabilities are shares of.
LOOKED_AT = 16


class RescoredHead(nn.Module):
    """Logits (B, Q, V) of (B, Q, D): those of `rough`, but for the `LOOKED_AT` greatest of each
    row, which are computed anew in float32.

    Words that are nearly as good as each other are what rounding turns around first: on flickr8k,
    an int8 head alone changes as many captions as int8 in all other layers of the decoder.
    """

    weight: Tensor

    def __init__(self, head: nn.Linear, rough: nn.Module) -> None:
        super().__init__()
        self.rough = rough
        # Not copied: a tied head is saved and loaded as one with its embedding.
        self.register_buffer("weight", head.weight.detach())
        self.count = min(LOOKED_AT, head.out_features)

    def forward(self, x_BQD: Tensor) -> Tensor:
        logits_BQV = self.rough(x_BQD)
        logits_NV = logits_BQV.flatten(0, -2)
        _, where_NC = greatest(logits_NV, self.count)
        exact_NC1 = self.weight[where_NC] @ x_BQD.float().flatten(0, -2).unsqueeze(2)
        return logits_NV.scatter_(1, where_NC, exact_NC1.squeeze(2)).view_as(logits_BQV)
