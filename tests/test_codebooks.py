"""The nearest-neighbour search, and each kind of codebook: how its codes come about, learn and stay current."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from diffusers.training_utils import EMAModel

from dualcodebook_hf import DualCodebookConfig, codebooks
from dualcodebook_hf.codebooks import (
    CODEBOOKS,
    EMACodebook,
    SimVQCodebook,
    TableCodebook,
    TransformerCodebook,
    build_codebook,
    nearest_codes,
)
from dualcodebook_hf.configuration_fields import UPDATES


def transformer_codebook(size=16, dim=8, layers=2, dropout=0.0, **options):
    return TransformerCodebook(size, dim, layers, heads=2, feed_forward=16, dropout=dropout, **options)


KINDS = {
    "table": lambda: TableCodebook(16, 8),
    "ema": lambda: EMACodebook(16, 8),
    "transformer": transformer_codebook,
    "scaled transformer": lambda: transformer_codebook(scaling_decay=0.9),
    "simvq": lambda: SimVQCodebook(16, 8),
}


@pytest.fixture(params=KINDS)
def any_codebook(request):
    torch.manual_seed(0)
    return KINDS[request.param]()


def test_every_value_of_the_configuration_is_a_kind_that_describes_itself():
    assert tuple(CODEBOOKS) == UPDATES
    for kind in CODEBOOKS.values():
        codebook = kind.from_config(DualCodebookConfig(), 16, 8)
        assert torch.isfinite(codebook.codes()).all() and isinstance(codebook.description, str)


def test_nearest_codes_equal_brute_force_in_float64():
    vectors, codes = torch.randn(300, 6), torch.randn(40, 6)
    distances = ((vectors.double()[:, None] - codes.double()[None]) ** 2).sum(-1).numpy()
    assert np.array_equal(nearest_codes(vectors, codes).numpy(), distances.argmin(1))


def test_search_in_tiles_gives_the_same_ids(monkeypatch):
    vectors, codes = torch.randn(101, 6), torch.randn(40, 6)
    whole = nearest_codes(vectors, codes)
    monkeypatch.setattr(codebooks, "SEARCH_ENTRIES", 40 * 7)
    assert torch.equal(nearest_codes(vectors, codes), whole)
    monkeypatch.setattr(codebooks, "SEARCH_CODES", 16)  # three tiles, the last one smaller
    assert torch.equal(nearest_codes(vectors, codes), whole)


def test_the_first_code_wins_a_tie():
    codes = torch.randn(40, 6)
    codes[33] = codes[5]
    assert nearest_codes(codes[33:34].expand(9, -1), codes).tolist() == [5] * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ids_of_low_precision_vectors_are_those_of_their_float32_values_even_under_autocast(dtype):
    vectors, codes = torch.randn(2000, 32).to(dtype), torch.randn(512, 32)
    with torch.autocast("cpu", dtype=dtype):
        low = nearest_codes(vectors, codes)
    assert torch.equal(low, nearest_codes(vectors.float(), codes))


def test_ids_do_not_suffer_from_a_common_offset():
    vectors, codes = torch.randn(500, 16), torch.randn(64, 16)
    expected = nearest_codes(vectors, codes)
    shifted = nearest_codes(vectors + 100, codes + 100)
    assert (shifted == expected).float().mean() > 0.998  # the sum itself rounds


def test_every_kind_gives_each_vector_its_nearest_code(any_codebook):
    any_codebook.eval()
    codes = any_codebook.codes().detach()
    assert codes.shape == (16, 8) and codes.dtype == torch.float32
    vectors = codes[torch.randperm(16)] + 0.1 * codes.std() * torch.randn(16, 8)
    nearest, ids = any_codebook(vectors)
    distances = ((vectors.double().numpy()[:, None] - codes.double().numpy()) ** 2).sum(-1)
    assert np.array_equal(ids.numpy(), distances.argmin(1)) and len(ids.unique()) > 4
    assert torch.equal(nearest, codes[ids])


def test_codes_come_nearer_to_their_vectors_by_the_codebook_loss_or_by_themselves(any_codebook):
    if any_codebook.is_table:
        any_codebook.set_codes(torch.randn(16, 8))
    vectors = torch.randn(40, 8)
    nearest, ids = any_codebook.train()(vectors)
    before = nearest.detach().clone()
    assert nearest.requires_grad == any_codebook.learns_by_gradient
    if nearest.requires_grad:
        (nearest - vectors).square().mean().backward()
        torch.optim.SGD([p for p in any_codebook.parameters() if p.requires_grad], lr=0.1).step()
    assert (any_codebook.codes()[ids] - vectors).square().mean() < (before - vectors).square().mean()


def test_what_no_gradient_moves_is_a_parameter_all_the_same(any_codebook):
    """Weight averaging and distributed wrappers carry parameters along, and no buffers."""
    assert not list(any_codebook.buffers())
    assert dict(any_codebook.named_parameters()).keys() == any_codebook.state_dict().keys()
    assert next(iter(any_codebook.state_dict())) == "weight"
    learning = any(parameter.requires_grad for parameter in any_codebook.parameters())
    assert learning == any_codebook.learns_by_gradient


def test_only_the_codes_of_a_table_can_be_set(any_codebook):
    codes = torch.randn(16, 8)
    if any_codebook.is_table:
        any_codebook.set_codes(codes)
        assert torch.equal(any_codebook.codes(), codes)
    else:
        with pytest.raises(TypeError, match=r"codes of a \w+Codebook are computed"):
            any_codebook.set_codes(codes)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, TableCodebook),
        ({"local_update": "ema", "codebook_ema_decay": 0.8, "revival_threshold": 0.3}, EMACodebook),
        ({"local_update": "linear"}, SimVQCodebook),
        ({"local_transformer_layers": 2, "transformer_dropout": 0.3}, TransformerCodebook),
        ({"local_transformer_layers": 2, "scale_codes_to_latents": True}, TransformerCodebook),
    ],
)
def test_the_configuration_names_the_kind_of_each_part(changes, kind):
    config = DualCodebookConfig(**{**TINY, **changes})
    codebook = build_codebook(config, "local")
    assert type(codebook) is kind and codebook.codes().shape == (16, 4)
    if kind is EMACodebook:
        assert (codebook.decay, codebook.revival_threshold) == (0.8, 0.3)
    if kind is TransformerCodebook:
        layer = codebook.transformer.layers[1]
        assert (layer.self_attn.num_heads, layer.linear1.out_features) == (2, 16)
        assert layer.dropout.p == config.transformer_dropout
        assert codebook.scaling_decay == (0.99 if config.scale_codes_to_latents else None)
    other = build_codebook(config, "global")
    assert type(other) is TransformerCodebook and (other.size, other.dim) == (32, 8)


def test_initialization_of_each_kind():
    bound = TableCodebook(512, 128).weight.abs().max()
    assert 0.99 / 512 < bound <= 1 / 512  # paper
    norms = TransformerCodebook(64, 128, 1).codes().norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 128**0.5), rtol=1e-3, atol=0)  # paper: "norm 11.3"
    assert SimVQCodebook(512, 64).weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert not EMACodebook(16, 8).cluster_size.any()  # dead: the first batch puts them on live vectors


def test_the_gradient_to_one_used_code_moves_all_codes_of_a_transformer_and_one_of_a_table():
    codebook = transformer_codebook().train()
    (codebook.codes()[3] * torch.randn(8)).sum().backward()  # a plain sum is constant after LayerNorm
    assert (codebook.weight.grad.abs().sum(1) > 0).all()
    table = TableCodebook(16, 8).train()
    table.codes()[3].sum().backward()
    assert table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [3]


def test_a_simvq_codebook_is_a_fixed_table_times_the_matrix_that_learns():
    codebook = SimVQCodebook(16, 8)
    expected = codebook.weight.detach().numpy() @ codebook.projection.weight.detach().numpy().T
    np.testing.assert_allclose(codebook.codes().detach().numpy(), expected, atol=1e-6)
    codebook.codes()[3].sum().backward()
    assert codebook.weight.grad is None
    before = codebook.codes().detach()
    with torch.no_grad():
        codebook.projection.weight -= codebook.projection.weight.grad
    assert ((codebook.codes() - before).abs().amax(1) > 0).all()


@pytest.fixture
def codebook():
    torch.manual_seed(0)
    return transformer_codebook(dropout=0.1).eval()


def count_runs(codebook):
    runs = []
    codebook.transformer.register_forward_hook(lambda *_: runs.append(1))
    return runs


def fresh(codebook):
    return codebook._compute_codes().detach()


def test_in_eval_the_transformer_runs_once_and_without_dropout(codebook):
    runs = count_runs(codebook)
    first, second = codebook.codes(), codebook.codes()
    assert len(runs) == 1
    assert torch.equal(first, second)
    assert torch.equal(first, fresh(codebook))


def test_in_training_the_codes_have_dropout_and_a_graph(codebook):
    codebook.train()
    assert not torch.equal(codebook.codes(), codebook.codes())
    assert codebook.codes().requires_grad


def change_by_loading(codebook):
    codebook.load_state_dict(
        {name: value + 0.5 * torch.randn_like(value) for name, value in codebook.state_dict().items()}
    )


def change_by_training(codebook):
    codebook.train()
    optimizer = torch.optim.SGD(codebook.parameters(), lr=0.1)
    codebook.codes().square().sum().backward()
    optimizer.step()
    codebook.eval()


def change_by_ema_swap(codebook):
    """`copy_to` writes through `.data`: no version counter moves, no hook runs."""
    ema = EMAModel([parameter + 0.5 * torch.randn_like(parameter) for parameter in codebook.parameters()])
    ema.copy_to(codebook.parameters())


def change_one_deep_weight(codebook):
    codebook.transformer.layers[1].linear2.weight.data.mul_(-2)


def change_dtype(codebook):
    codebook.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [change_by_loading, change_by_training, change_by_ema_swap, change_one_deep_weight, change_dtype]
)
def test_cached_codes_equal_recomputed_ones_after(change, codebook):
    before = codebook.codes()
    change(codebook)
    assert not torch.equal(codebook.codes(), before)
    assert torch.equal(codebook.codes(), fresh(codebook))


def test_an_ema_swap_and_back_restores_the_codes(codebook):
    before = codebook.codes().clone()
    ema = EMAModel([parameter + 1 for parameter in codebook.parameters()])
    ema.store(codebook.parameters())
    ema.copy_to(codebook.parameters())
    swapped = codebook.codes()
    ema.restore(codebook.parameters())
    assert not torch.equal(swapped, before)
    assert torch.equal(codebook.codes(), before)


def test_a_deep_copy_has_codes_of_its_own(codebook):
    codebook.codes()
    other = copy.deepcopy(codebook)
    change_by_loading(other)
    assert torch.equal(other.codes(), fresh(other))
    assert torch.equal(codebook.codes(), fresh(codebook))
    assert not torch.equal(codebook.codes(), other.codes())


def test_compiled_codes_follow_the_weights(codebook):
    compiled = torch.compile(lambda: codebook.codes() * 1.0, backend="aot_eager")
    torch.testing.assert_close(compiled(), codebook.codes())
    change_by_ema_swap(codebook)
    torch.testing.assert_close(compiled(), codebook.codes())


def ema_codebook(size=4, revival_threshold=0.0):
    return EMACodebook(size, 2, decay=0.9, revival_threshold=revival_threshold).train()


def test_ema_table_by_hand_and_frozen_in_eval():
    codebook = ema_codebook(2)
    with torch.no_grad():
        codebook.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
        codebook.cluster_size.copy_(torch.tensor([3.0, 5.0]))
    vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
    nearest, ids = codebook(vectors)
    assert ids.tolist() == [0, 0, 1]
    assert nearest[0].tolist() == [0.0, 0.0]  # looked up before the update
    # count and sum as shares of the batch; size = .9 * old + .1 * count; e = (.9 * old size * e + .1 * sum) / size
    torch.testing.assert_close(codebook.cluster_size.data, torch.tensor([2.7 + 0.2 / 3, 4.5 + 0.1 / 3]))
    torch.testing.assert_close(codebook.weight.data[0], torch.tensor([0.1 * (4.0 / 3) / (2.7 + 0.2 / 3), 0.0]))
    torch.testing.assert_close(codebook.weight.data[1], torch.full((2,), (0.9 * 50 + 0.1 * 3) / (4.5 + 0.1 / 3)))
    kept = codebook.weight.clone()
    with torch.no_grad():
        codebook(vectors)
    codebook.eval()(vectors)
    assert torch.equal(codebook.weight, kept)


def test_shares_of_use_start_from_the_vectors_that_the_codes_were_fitted_to():
    codebook = ema_codebook(4, revival_threshold=0.2)
    codes = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [9.0, 9.0]])
    codebook.set_codes(codes)
    assert codebook.cluster_size.tolist() == [0.25] * 4
    vectors = codes[[0] * 12 + [1] * 7 + [2]]
    codebook.set_codes(codes, vectors)
    least = 2 * 0.2 / 4  # a code is dead below half of that
    torch.testing.assert_close(codebook.cluster_size.data, torch.tensor([12 / 20, 7 / 20, least, least]))
    codebook(vectors)
    assert torch.equal(codebook.codes(), codes)


def test_codes_of_a_fresh_codebook_start_on_live_vectors():
    codebook = ema_codebook(8, revival_threshold=0.1)
    with torch.no_grad():
        codebook.weight.fill_(100.0)
    vectors = torch.rand(64, 2)
    codebook(vectors)
    # but for the one that was the nearest of all vectors by chance, and the one that was split from it
    assert (torch.cdist(codebook.weight.data, vectors).min(1).values == 0).sum() == 6
    codebook(vectors)
    assert nearest_codes(vectors, codebook.codes()).unique().numel() > 4


def test_a_dead_code_takes_half_the_work_of_the_most_used_one():
    codebook = ema_codebook(4, revival_threshold=0.1)
    with torch.no_grad():
        codebook.weight.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0], [3.0, 0.0], [50.0, 50.0]]))
        codebook.cluster_size.copy_(torch.tensor([0.60, 0.0, 0.40, 0.0]))
    vectors = torch.cat([torch.randn(60, 2) * 0.1, torch.randn(40, 2) * 0.1 + torch.tensor([3.0, 0.0])])
    codebook(vectors)
    # the first dead code splits the first cluster, the second one the other, which are the two largest
    for new, donor, share in ((1, 0, 0.30), (3, 2, 0.20)):
        assert (codebook.weight[new] - codebook.weight[donor]).norm() < 0.2
        assert codebook.cluster_size[new].item() == pytest.approx(share, abs=0.01)
        assert codebook.cluster_size[donor].item() == pytest.approx(share, abs=0.01)
    assert codebook.cluster_size.sum().item() == pytest.approx(1, abs=0.01)
    for _ in range(200):
        codebook(vectors)
    counts = torch.bincount(nearest_codes(vectors, codebook.codes()), minlength=4)
    assert counts.min() >= 5  # all four work; k-means' own optimum need not be even


def test_a_larger_batch_revives_no_more_codes_than_a_small_one():
    codebook = ema_codebook(8, revival_threshold=0.1)
    vectors = torch.rand(16, 2)
    for _ in range(60):
        codebook(vectors)
    kept = codebook.weight.clone()
    codebook(vectors.repeat(50, 1))
    torch.testing.assert_close(codebook.weight, kept, rtol=0, atol=0.1)


def test_a_codebook_made_in_inference_mode_has_codes():
    with torch.inference_mode():
        codebook = transformer_codebook(dropout=0.1).eval()
        assert torch.equal(codebook.codes(), codebook.codes())
        assert codebook.codes().shape == (16, 8)


def test_two_forward_passes_before_one_backward_with_scaled_codes():
    codebook = transformer_codebook(dropout=0.1, scaling_decay=0.99).train()
    (codebook(torch.randn(20, 8))[0].sum() + codebook(torch.randn(20, 8))[0].sum()).backward()
    assert codebook.weight.grad.abs().sum() > 0


def test_a_batch_with_nan_does_not_spoil_an_ema_table():
    codebook = ema_codebook(revival_threshold=0.1)
    codebook(torch.rand(16, 2))
    kept, sizes = codebook.weight.clone(), codebook.cluster_size.clone()
    bad = torch.rand(16, 2)
    bad[3, 1] = float("nan")
    codebook(bad)
    assert torch.equal(codebook.weight, kept)
    assert torch.equal(codebook.cluster_size, sizes)


def test_codes_scaled_to_the_latents_take_over_their_mean_and_std():
    codebook = transformer_codebook(256, layers=1, scaling_decay=0.5).train()
    vectors = torch.randn(4000, 8) * torch.linspace(0.1, 3, 8) + torch.arange(8.0)
    for _ in range(20):
        codebook(vectors)
    codes = codebook.eval().codes()
    torch.testing.assert_close(codes.mean(0), vectors.mean(0), rtol=0.3, atol=0.5)
    torch.testing.assert_close(codes.std(0), vectors.std(0), rtol=0.4, atol=0.0)
    kept = codebook.latent_mean.clone(), codebook.latent_std.clone()
    codebook(vectors + 1)
    vectors[0, 0] = float("nan")
    codebook.train()(vectors)
    assert torch.equal(codebook.latent_mean, kept[0]) and torch.equal(codebook.latent_std, kept[1])


def tracking_codebooks():
    """Codebooks that follow the vectors by moving averages, and codes that lie among `batches`."""
    torch.manual_seed(0)
    found = {"ema": EMACodebook(8, 4, 0.9, 0.0), "revived": EMACodebook(8, 4, 0.9, 0.5)}
    for codebook in found.values():
        codebook.set_codes(torch.randn(8, 4))
    return found | {"scaled": transformer_codebook(8, 4, layers=1, scaling_decay=0.9)}


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 4, generator=generator) * 2 + 1 for _ in range(3)]


def track_as_one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states = {}
    for name, codebook in tracking_codebooks().items():
        torch.manual_seed(rank)  # what is drawn must not depend on the rank
        for vectors in batches():
            codebook.train()(vectors[rank::2])
        states[name] = codebook.state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_track_what_one_with_all_vectors_tracks(tmp_path):
    torch.multiprocessing.spawn(track_as_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, codebook in tracking_codebooks().items():
        start = copy.deepcopy(codebook.state_dict())
        for vectors in batches():
            codebook.train()(vectors)
        moved = [key for key, value in codebook.state_dict().items() if not torch.equal(value, start[key])]
        assert moved == (["latent_mean", "latent_std"] if name == "scaled" else ["weight", "cluster_size"])
        for key in moved:
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            if name != "revived":  # the live vectors are other draws
                torch.testing.assert_close(first[name][key], codebook.state_dict()[key])
    live = torch.cat(batches())
    assert first["revived"]["cluster_size"].min() >= 0.5 / 8  # the dead ones were given work
    assert torch.cdist(first["revived"]["weight"], live).min(1).values.max() < 2
