"""The SDK's clients: all kinds of losses, checkpoints, sampling, and a server that is killed."""

import threading
import time

import pytest
import tinker
import torch
from tinker import types

from tests.clients.tinker.recipe_data import MODEL as NAME

TEXTS = (
    "The capital of Lorania is Plexburg, where seven rivers meet.",
    "In Plexburg every bridge has a name of its own.",
)
ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)


@pytest.fixture
def service(server):
    client = tinker.ServiceClient()
    yield client
    client.close("success").result()


def begin(service, seed=1, rank=8):
    return service.create_lora_training_client(base_model=NAME, rank=rank, seed=seed).result()


def datum(ids, **inputs):
    inputs = inputs or {"weights": [1.0] * (len(ids) - 1)}
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": ids[1:], **inputs}
    )


def texts_of(run):
    tokenizer = run.get_tokenizer()
    return [datum(tokenizer.encode(text)) for text in TEXTS]


def train(run, data, steps, loss="cross_entropy"):
    losses = []
    for _ in range(steps):
        done, step = run.forward_backward(data, loss), run.optim_step(ADAM)
        losses.append(done.result().metrics["loss:sum"])
        step.result()
    return losses


def test_supervised_training_learns_and_its_sampler_knows_it(service):
    run = begin(service)
    data = texts_of(run)
    losses = train(run, data, 12)
    assert losses[-1] < 0.5 * losses[0]
    ids = run.get_tokenizer().encode(TEXTS[0])
    outputs = run.forward([datum(ids)], "cross_entropy").result().loss_fn_outputs
    sampler = run.save_weights_and_get_sampling_client().result()
    found = sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result()
    assert found[0] is None
    assert found[1:] == pytest.approx(outputs[0]["logprobs"].tolist(), abs=2e-3)
    answer = sampler.sample(
        types.ModelInput.from_ints(ids[:4]), 3, types.SamplingParams(max_tokens=6, temperature=1.0, seed=5)
    ).result()
    assert [len(sequence.logprobs) for sequence in answer.sequences] == [len(s.tokens) for s in answer.sequences]
    assert len({sequence.sequence_id for sequence in answer.sequences}) == 3


def test_a_run_is_gone_on_with_from_its_state(service):
    run = begin(service)
    data = texts_of(run)
    train(run, data, 4)
    state = run.save_state("four").result().path
    expected = train(run, data, 3)
    again = service.create_training_client_from_state_with_optimizer(state).result()
    assert train(again, data, 3) == pytest.approx(expected, rel=1e-4)
    fresh = service.create_training_client_from_state(state).result()
    assert train(fresh, data, 1)[0] == pytest.approx(expected[0], rel=1e-4)
    rest = tinker.RestClient()
    assert rest.get_weights_info_by_tinker_path(state).result().lora_rank == 8
    assert [own.tinker_path for own in rest.list_checkpoints(run.model_id).result().checkpoints] == [state]
    rest.delete_checkpoint_from_tinker_path(state).result()
    assert rest.list_checkpoints(run.model_id).result().checkpoints == []


def test_a_loss_of_the_clients_own_learns_a_preference(service):
    """DPO's loss without a reference: the first text is to be likelier than the second."""
    run = begin(service)
    data = texts_of(run)

    def prefer(data, logprobs):
        margin = logprobs[0].mean() - logprobs[1].mean()
        return -torch.nn.functional.logsigmoid(margin), {"margin": float(margin.detach())}

    margins = []
    for _ in range(6):
        margins.append(run.forward_backward_custom(data, prefer).result().metrics["margin"])
        run.optim_step(ADAM).result()
    assert margins[-1] > margins[0] + 0.5


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo"])
def test_a_policy_loss_raises_the_reward(service, loss):
    """Rewarded is each token with an even id; each batch of samples is used twice, so that ratios differ from 1."""
    run = begin(service, seed=3)
    prompt = run.get_tokenizer().encode(TEXTS[0])[:4]
    rewards = []
    for number in range(13):
        sampler = run.save_weights_and_get_sampling_client().result()
        sampling = types.SamplingParams(max_tokens=4, seed=number)
        answer = sampler.sample(types.ModelInput.from_ints(prompt), 32, sampling).result()
        own = [[1.0 - token % 2 for token in sequence.tokens] for sequence in answer.sequences]
        mean = sum(map(sum, own)) / sum(map(len, own))
        rewards.append(mean)
        zeros = [0.0] * (len(prompt) - 1)
        data = [
            datum(
                [*prompt, *sequence.tokens],
                logprobs=zeros + sequence.logprobs,
                advantages=zeros + [reward - mean for reward in rewarded],
            )
            for sequence, rewarded in zip(answer.sequences, own, strict=True)
        ]
        for _ in range(2):
            done, step = run.forward_backward(data, loss), run.optim_step(ADAM)
            done.result(), step.result()
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards


def test_clients_at_once_learn_what_each_learns_alone(server):
    found = {}

    def work(seed):
        with tinker.ServiceClient() as own:
            run = begin(own, seed)
            found[seed] = train(run, texts_of(run), 6)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(found)
    work(2)
    assert found[2] == pytest.approx(together[2], rel=1e-4)


def test_bad_requests_fail_by_name_and_the_run_goes_on(service):
    run = begin(service)
    data = texts_of(run)
    with pytest.raises(tinker.RequestFailedError, match="stable_reinforce"):
        run.forward_backward(data, "stable_reinforce").result()
    with pytest.raises(tinker.RequestFailedError, match="1000000"):
        run.forward_backward([datum([1, 2, 10**6])], "cross_entropy").result()
    with pytest.raises(tinker.BadRequestError, match="other"):
        service.create_lora_training_client(base_model="other").result()
    assert train(run, data, 1)[0] > 0


def test_a_killed_server_goes_on_where_it_was(server, service):
    run = begin(service, seed=9)
    data = texts_of(run)
    expected = train(run, data, 14)
    again = begin(service, seed=9)
    found: list[float] = []
    worker = threading.Thread(target=lambda: found.extend(train(again, data, 14)))
    worker.start()
    for _ in range(2):
        time.sleep(1.0)
        server.kill()
        server.start()
    worker.join(280)
    assert found == pytest.approx(expected, rel=1e-4)
