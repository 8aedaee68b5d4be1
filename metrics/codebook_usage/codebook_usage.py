"""How a tokenizer uses its codebooks, for `evaluate.load`."""

import evaluate

from dualcodebook_hf.metrics.evaluate_inputs import token_features, token_grid
from dualcodebook_hf.metrics.tokens import TokenStatistics

_DESCRIPTION = """
Usage, perplexity and entropy of each codebook, and the entropy of the codebooks' tokens together, over all token grids.
"""

_INPUTS = """
Args:
    predictions: grids (codebooks, h, w) of integers, as `model.tokenize` gives them; their sizes may differ.
    sizes: codes of each codebook by name, in the order of the codebooks, such as {"global": 512, "local": 512}.

Returns, for each codebook:
    <codebook>_usage: share of its codes that occur.
    <codebook>_perplexity: 2 to the entropy of its tokens.
    <codebook>_normalized_entropy: that entropy over log2 of the codebook's size.
and
    pair_entropy: bits of the codebooks' tokens together; P positions cannot show more than log2 P.
"""


class CodebookUsage(evaluate.Metric):
    """See the module's description."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=token_features(),
        )

    def _compute(self, predictions, sizes=None):
        if not isinstance(sizes, dict):
            raise ValueError(f'`sizes` must name the codebooks, such as {{"global": 512, "local": 512}}, got {sizes!r}')
        if not predictions:
            raise ValueError("`predictions` must hold grids of tokens, got none")
        statistics = TokenStatistics(sizes)
        for prediction in predictions:
            statistics.update(token_grid(prediction)[None])
        result = {"pair_entropy": statistics.pair_entropy}
        for name, values in statistics.codebooks().items():
            result.update({f"{name}_{key}": value for key, value in values.items() if key != "size"})
        return result
