"""Bugs that people reported in public, each reduced to the lines that make it.

A bug is a factory: it builds fresh tensors and returns the program as it was written and the same program out of place.
Both return gradients. The lines that save and overwrite are marked in the source, and the tests hold guard to them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Gradients = tuple[torch.Tensor, ...]
Program = Callable[[], Gradients]


@dataclass(frozen=True)
class Bug:
    factory: Callable[[], tuple[Program, Program]]
    thread: str  # where it was reported
    plain: str  # what torch does: "raises" in backward, or is "silent" with a wrong gradient

    def programs(self) -> tuple[Program, Program]:
        torch.manual_seed(0)
        return self.factory()

    def line(self, mark: str) -> int:
        lines, first = inspect.getsourcelines(self.factory)
        found = [first + i for i, line in enumerate(lines) if "#" in line and mark in line.split("#")[1]]
        assert len(found) == 1, f"{self.factory.__name__}: one line marked {mark}, not {found}"
        return found[0]


BUGS: dict[str, Bug] = {}


def bug(thread: str, plain: str = "raises") -> Callable:
    def register(factory: Callable) -> Callable:
        BUGS[factory.__name__] = Bug(factory, thread, plain)
        return factory

    return register


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def grads(loss: torch.Tensor, *leaves: torch.Tensor) -> Gradients:
    return torch.autograd.grad(loss, leaves)


# ---- activations and residuals


@bug("https://github.com/pytorch/vision/issues/807")
def residual_after_relu():
    x, w = leaf(4, 8), leaf(8, 8)

    def wrong():
        out = torch.relu(x @ w)  # SAVE
        out += x  # WRITE
        return grads(out.square().sum(), x, w)

    def right():
        return grads((torch.relu(x @ w) + x).square().sum(), x, w)

    return wrong, right


@bug("https://github.com/iMED-Lab/ER-Net/pull/3")
def residual_of_a_block_that_ends_in_relu():
    block, x = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True)), leaf(1, 2, 5, 5)

    def wrong():
        out = block(x)  # SAVE
        out += x  # WRITE
        return grads(out.sum(), x, *block.parameters())

    def right():
        return grads((block(x) + x).sum(), x, *block.parameters())

    return wrong, right


@bug("https://github.com/pytorch/pytorch/issues/15428")
def shortcut_before_a_block_that_starts_in_place():
    shortcut = nn.Conv2d(2, 2, 1)
    residual = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1))
    x = leaf(2, 2, 4, 4)

    def wrong():
        h = x * 1.5
        out = shortcut(h)  # SAVE
        h = F.relu(h, inplace=True)  # WRITE
        return grads((out + residual(h)).square().sum(), x, *shortcut.parameters())

    def right():
        h = x * 1.5
        return grads((shortcut(h) + residual(F.relu(h))).square().sum(), x, *shortcut.parameters())

    return wrong, right


@bug("https://github.com/pytorch/pytorch/issues/9391")
def assignment_into_a_sigmoid():
    a = leaf(3)

    def wrong():
        b = a.sigmoid()  # SAVE
        b[1] = 2  # WRITE
        return grads(b.sum(), a)

    def right():
        return grads((a.sigmoid() * torch.tensor([1.0, 0.0, 1.0])).sum(), a)

    return wrong, right


@bug("https://github.com/ultralytics/yolov5/issues/9910")
def decoding_boxes_inside_a_sigmoid():
    x, grid = leaf(2, 6, 5), torch.rand(6, 2)

    def wrong():
        y = x.sigmoid()  # SAVE
        y[..., 0:2] = (y[..., 0:2] * 2 + grid) * 8  # WRITE
        return grads(y.sum(), x)

    def right():
        y = x.sigmoid()
        return grads(torch.cat([(y[..., 0:2] * 2 + grid) * 8, y[..., 2:]], -1).sum(), x)

    return wrong, right


@bug("https://github.com/open-mmlab/mmdetection/pull/9450")
def feature_pyramid_with_activated_laterals():
    convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(3))
    features = [leaf(1, 2, size, size) for size in (8, 4, 2)]

    def wrong():
        laterals = [F.relu(conv(feature), inplace=True) for conv, feature in zip(convs, features, strict=True)]  # SAVE
        for i in (2, 1):
            laterals[i - 1] += F.interpolate(laterals[i], scale_factor=2.0)  # WRITE
        return grads(sum(lateral.sum() for lateral in laterals), *features)

    def right():
        laterals = [F.relu(conv(feature)) for conv, feature in zip(convs, features, strict=True)]
        for i in (2, 1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], scale_factor=2.0)
        return grads(sum(lateral.sum() for lateral in laterals), *features)

    return wrong, right


@bug("https://github.com/mapillary/inplace_abn/issues/46")
def auxiliary_head_before_an_inplace_module():
    head, module, x = nn.Conv2d(2, 3, 1), nn.LeakyReLU(0.1, inplace=True), leaf(1, 2, 4, 4)

    def wrong():
        features = x * 2
        auxiliary = head(features)  # SAVE
        main = module(features)  # WRITE
        return grads(auxiliary.sum() + main.square().sum(), x, *head.parameters())

    def right():
        features = x * 2
        return grads(head(features).sum() + F.leaky_relu(features, 0.1).square().sum(), x, *head.parameters())

    return wrong, right


@bug("https://github.com/BierOne/bottom-up-attention-vqa/issues/6")
def inplace_dropout_after_relu():
    x, w = leaf(4, 8), leaf(8, 8)

    def wrong():
        torch.manual_seed(1)
        h = torch.relu(x @ w)  # SAVE
        h = F.dropout(h, 0.5, training=True, inplace=True)  # WRITE
        return grads(h.square().sum(), x, w)

    def right():
        torch.manual_seed(1)
        return grads(F.dropout(torch.relu(x @ w), 0.5, training=True).square().sum(), x, w)

    return wrong, right


@bug("https://github.com/dreamgonfly/GAN-tutorial/issues/1")
def inplace_leaky_relu_over_what_a_gate_saved():
    x, w = leaf(4, 8), leaf(8)

    def wrong():
        h = x * 2
        gate = h * w  # SAVE
        h = F.leaky_relu_(h, 0.2)  # WRITE
        return grads((gate + h).sum(), x, w)

    def right():
        h = x * 2
        return grads((h * w + F.leaky_relu(h, 0.2)).sum(), x, w)

    return wrong, right


@bug("https://github.com/pytorch/pytorch/issues/5687")
def squeeze_and_excite_scales_in_place():
    x, w = leaf(2, 3, 4), leaf(3, 3)

    def wrong():
        y = x * 1.0
        gate = torch.sigmoid(y.mean(-1) @ w)
        scaled = y * gate.unsqueeze(-1)  # SAVE
        y.mul_(0.5)  # WRITE
        return grads((scaled + y).sum(), x, w)

    def right():
        y = x * 1.0
        gate = torch.sigmoid(y.mean(-1) @ w)
        return grads((y * gate.unsqueeze(-1) + y * 0.5).sum(), x, w)

    return wrong, right


@bug("https://github.com/quark0/darts/issues/109")
def mixed_operation_of_darts_with_an_inplace_relu():
    alpha, convs = leaf(2), nn.ModuleList(nn.Conv2d(2, 2, 1, bias=False) for _ in range(2))
    x = leaf(1, 2, 3, 3)

    def wrong():
        state = x + 0
        outputs = [convs[0](state)]  # SAVE
        outputs.append(convs[1](F.relu(state, inplace=True)))  # WRITE
        mixed = sum(a * out for a, out in zip(alpha.softmax(0), outputs, strict=True))
        return grads(mixed.sum(), x, alpha, *convs.parameters())

    def right():
        outputs = [convs[0](x), convs[1](F.relu(x))]
        mixed = sum(a * out for a, out in zip(alpha.softmax(0), outputs, strict=True))
        return grads(mixed.sum(), x, alpha, *convs.parameters())

    return wrong, right


@bug("https://github.com/Jee-King/TSAN/issues/3")
def an_alias_taken_for_a_copy():
    x, w = leaf(3, 4), leaf(4)

    def wrong():
        h = torch.tanh(x)  # SAVE
        out = h
        out *= w  # WRITE
        return grads((out + x).sum(), x, w)

    def right():
        return grads((torch.tanh(x) * w + x).sum(), x, w)

    return wrong, right


# ---- normalisation, attention, masks


@bug("https://github.com/huggingface/transformers/pull/24529")
def normalised_embeddings_of_owlvit():
    x = leaf(3, 5)

    def wrong():
        embeds = x * 2
        embeds /= torch.linalg.norm(embeds, dim=-1, keepdim=True) + 1e-6  # SAVE WRITE
        return grads(embeds[:, 0].sum(), x)

    def right():
        embeds = x * 2
        embeds = embeds / (torch.linalg.norm(embeds, dim=-1, keepdim=True) + 1e-6)
        return grads(embeds[:, 0].sum(), x)

    return wrong, right


@bug("https://github.com/yashbonde/dall-e-baby/issues/1")
def attention_masked_after_softmax():
    q, k, v = leaf(2, 4, 8), leaf(2, 4, 8), leaf(2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)

    def wrong():
        attention = (q @ k.transpose(-1, -2)).softmax(-1)  # SAVE
        attention.masked_fill_(mask, 0)  # WRITE
        return grads((attention @ v).sum(), q, k, v)

    def right():
        attention = (q @ k.transpose(-1, -2)).softmax(-1).masked_fill(mask, 0)
        return grads((attention @ v).sum(), q, k, v)

    return wrong, right


@bug("https://github.com/hkchengrex/XMem/issues/140")
def softmax_in_place_over_its_own_exponential():
    affinity = leaf(6, 3)

    def wrong():
        e = torch.exp(affinity - affinity.amax(0, keepdim=True).detach())  # SAVE
        e.div_(e.sum(0, keepdim=True).detach())  # WRITE
        return grads(e[0].sum(), affinity)

    def right():
        e = torch.exp(affinity - affinity.amax(0, keepdim=True).detach())
        return grads((e / e.sum(0, keepdim=True).detach())[0].sum(), affinity)

    return wrong, right


@bug("https://github.com/r9y9/tacotron_pytorch/issues/16", plain="silent")
def alignment_masked_through_data():
    energy, mask = leaf(3, 6), torch.arange(6) > 3

    def wrong():
        alignment = torch.tanh(energy)  # SAVE
        alignment.data.masked_fill_(mask, -9.0)  # WRITE
        return grads(alignment.square().sum(), energy)

    def right():
        # To autograd the mask is not there: the values are masked, tanh's own gradient is not.
        tanh = torch.tanh(energy)
        alignment = tanh + (tanh.masked_fill(mask, -9.0) - tanh).detach()
        return grads(alignment.square().sum(), energy)

    return wrong, right


@bug("https://github.com/DCurro/CannyEdgePytorch/issues/5")
def thinned_edges_zeroed_where_masked():
    img = leaf(1, 1, 6, 6)

    def wrong():
        magnitude = torch.sqrt(img**2 + 1e-3)  # SAVE
        magnitude[magnitude < 0.5] = 0.0  # WRITE
        return grads(magnitude.sum(), img)

    def right():
        magnitude = torch.sqrt(img**2 + 1e-3)
        return grads(magnitude.masked_fill(magnitude < 0.5, 0.0).sum(), img)

    return wrong, right


@bug("https://github.com/JDAI-CV/LIO/issues/9")
def polar_coordinates_shifted_after_use():
    x = leaf(4, 7)

    def wrong():
        angle = x - x.mean()
        loss = angle.square().mean()  # SAVE
        angle -= 0.5  # WRITE
        return grads(loss + angle.sum(), x)

    def right():
        angle = x - x.mean()
        return grads(angle.square().mean() + (angle - 0.5).sum(), x)

    return wrong, right


# ---- recurrence, buffers, graphs


@bug("https://github.com/facebookresearch/fairseq/issues/251")
def one_step_of_encoder_out_replaced():
    encoder_out, w = leaf(2, 3, 5), leaf(2, 3)

    def wrong():
        out = encoder_out * 1
        step = out[:, :, 2] * w  # SAVE
        out[:, :, 2] = step  # WRITE
        return grads(out.square().sum(), encoder_out, w)

    def right():
        step = encoder_out[:, :, 2] * w
        out = torch.cat([encoder_out[:, :, :2], step.unsqueeze(-1), encoder_out[:, :, 3:]], -1)
        return grads(out.square().sum(), encoder_out, w)

    return wrong, right


@bug("https://github.com/NVlabs/FUNIT/issues/23")
def states_collected_in_a_buffer():
    cell, x = nn.Linear(3, 3), torch.randn(4, 2, 3)

    def wrong():
        states = torch.ones(5, 2, 3)
        for t in range(4):
            h = cell(states[t] + x[t]) * states[t]  # SAVE
            states[t + 1] = h  # WRITE
        return grads(states.square().sum(), *cell.parameters())

    def right():
        states = [torch.ones(2, 3)]
        for t in range(4):
            states.append(cell(states[t] + x[t]) * states[t])
        return grads(torch.stack(states).square().sum(), *cell.parameters())

    return wrong, right


@bug("https://github.com/keras-team/keras/pull/20916")
def stateful_recurrence_copies_into_its_state():
    w, x = leaf(3, 3), torch.randn(2, 4, 3)
    state = torch.randn(4, 3)

    def wrong():
        outputs = []
        for step in x:
            new = torch.tanh(step + state @ w)  # SAVE
            outputs.append(new)
            with torch.no_grad():
                state.copy_(new)  # WRITE
        return grads(sum(out.sum() for out in outputs), w)

    def right():
        outputs, h = [], state
        for step in x:
            new = torch.tanh(step + h @ w)
            outputs.append(new)
            h = new.detach()
        return grads(sum(out.sum() for out in outputs), w)

    return wrong, right


@bug("https://github.com/Seanny123/da-rnn/issues/14")
def one_column_added_to():
    x, w = leaf(4, 3), leaf(4)

    def wrong():
        weighted = x * 1
        context = weighted[:, 1] * w  # SAVE
        weighted[:, 1] += context  # WRITE
        return grads(weighted.sum(), x, w)

    def right():
        context = x[:, 1] * w
        return grads(x.sum() + context.sum(), x, w)

    return wrong, right


@bug("https://github.com/pyg-team/pytorch_geometric/issues/7283")
def messages_added_to_their_own_nodes():
    x, weight = leaf(4, 3), leaf(3)
    source, target = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])

    def wrong():
        nodes = x * 1
        messages = nodes * weight  # SAVE
        nodes.index_add_(0, target, messages[source])  # WRITE
        return grads(nodes.square().sum(), x, weight)

    def right():
        return grads(x.index_add(0, target, (x * weight)[source]).square().sum(), x, weight)

    return wrong, right


@bug("https://github.com/yujianke100/GFDN/issues/4")
def graph_layer_with_an_inplace_relu_between_two_uses():
    x, w1, w2 = leaf(4, 3), leaf(3, 3), leaf(3, 3)

    def wrong():
        h = x + 1
        left = h @ w1  # SAVE
        right = nn.ReLU(inplace=True)(h) @ w2  # WRITE
        return grads((left * right).sum(), x, w1, w2)

    def right():
        h = x + 1
        return grads(((h @ w1) * (torch.relu(h) @ w2)).sum(), x, w1, w2)

    return wrong, right


@bug("https://github.com/pytorch/pytorch/issues/26596")
def embedding_renormed_after_its_weight_was_used():
    embedding, w = nn.Embedding(3, 5, max_norm=1.0), leaf(7, 5)
    index = torch.tensor([1, 2])

    def wrong():
        a = embedding.weight @ w.t()  # SAVE
        b = embedding(index) @ w.t()  # WRITE
        return grads((a.sum() + b.sum()).sigmoid(), w)

    def right():
        before = embedding.weight.detach().clone().requires_grad_()
        a = before @ w.t()
        b = embedding(index) @ w.t()
        return grads((a.sum() + b.sum()).sigmoid(), w)

    return wrong, right


@bug("https://github.com/pytorch/pytorch/issues/24413", plain="silent")
def function_that_saves_a_view_of_its_result():
    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            result = (x.clone() * 2).t()
            ctx.save_for_backward(result)
            return result

        @staticmethod
        def backward(ctx, grad):
            (result,) = ctx.saved_tensors
            return (grad * result).t()

    x = leaf(2, 3)

    def wrong():
        y = Transposed.apply(x)  # SAVE
        y.data.add_(1)  # WRITE
        return grads(y.sum(), x)

    def right():
        return grads(Transposed.apply(x).sum(), x)

    return wrong, right


@bug("https://github.com/sniklaus/softmax-splatting/issues/50")
def function_whose_input_is_overwritten_by_the_next_layer():
    class Splat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, flow):
            ctx.save_for_backward(x, flow)
            return x * flow

        @staticmethod
        def backward(ctx, grad):
            x, flow = ctx.saved_tensors
            return grad * flow, grad * x

    x, flow = leaf(3, 4), leaf(3, 4)

    def wrong():
        h = x * 1
        y = Splat.apply(h, flow)  # SAVE
        h.clamp_(min=0)  # WRITE
        return grads((y + h).sum(), x, flow)

    def right():
        return grads((Splat.apply(x * 1, flow) + x.clamp(min=0)).sum(), x, flow)

    return wrong, right


@bug("https://github.com/linkedin/Liger-Kernel/issues/254", plain="silent")
def backward_that_reuses_its_saved_input_which_another_node_saved():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return x.detach().data.mul_(2).mul_(grad)  # WRITE

    a = leaf(4)

    def wrong():
        e = torch.exp(a)  # SAVE
        return grads(Scaled.apply(e).sum(), a)

    def right():
        return grads(torch.exp(a).square().sum(), a)

    return wrong, right


# ---- buffers that someone else writes


@bug("https://github.com/pytorch/pytorch/issues/22095")
def buffer_broadcast_before_each_forward():
    linear, buffer, x = nn.Linear(4, 3), torch.zeros(1, 3), torch.randn(2, 4)

    def wrong():
        losses = []
        for value in (1.0, 2.0):
            buffer.copy_(torch.full_like(buffer, value))  # WRITE
            losses.append((linear(x) * buffer).sum())  # SAVE
        return grads(sum(losses), *linear.parameters())

    def right():
        losses = [(linear(x) * torch.full_like(buffer, value)).sum() for value in (1.0, 2.0)]
        return grads(sum(losses), *linear.parameters())

    return wrong, right


@bug("https://github.com/pytorch/pytorch/issues/175024")
def running_statistics_broadcast_between_two_forwards():
    norm, x = nn.BatchNorm1d(3), leaf(8, 3)

    def wrong():
        fake = norm(x)  # SAVE
        norm.running_mean.copy_(torch.zeros(3))  # WRITE
        return grads(fake.square().sum() + x.sum(), x)

    def right():
        return grads(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True).square().sum() + x.sum(), x)

    return wrong, right


@bug("https://github.com/pytorch/pytorch/issues/65907", plain="silent")
def eval_statistics_updated_by_a_forward_in_train_mode():
    norm, x, other = nn.BatchNorm1d(3), leaf(4, 3), torch.randn(4, 3) * 5

    def wrong():
        norm.eval()
        y = norm(x)  # SAVE
        norm.train()
        norm(other)  # WRITE
        return grads(y.square().sum(), x)

    def right():
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        return grads(F.batch_norm(x, mean, var, norm.weight, norm.bias).square().sum(), x)

    return wrong, right


# ---- optimizers between a forward and its backward


@bug("https://github.com/geekyutao/RN/pull/19")
def discriminator_steps_before_the_generator_goes_backward():
    generator, discriminator = nn.Linear(3, 4), nn.Linear(4, 1)
    noise = torch.randn(5, 3)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.1)

    def wrong():
        fake = generator(noise)
        generator_loss = discriminator(fake).sum()  # SAVE
        discriminator(fake.detach()).square().sum().backward()
        optimizer.step()  # WRITE
        return grads(generator_loss, *generator.parameters())

    def right():
        return grads(discriminator(generator(noise)).sum(), *generator.parameters())

    return wrong, right


@bug("https://github.com/tamarott/SinGAN/issues/148")
def generator_steps_twice_on_one_fake_image():
    generator, critic, noise = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 1), torch.randn(5, 3)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)

    def wrong():
        fake = generator(noise)  # SAVE
        for _ in range(2):
            optimizer.zero_grad()
            loss = critic(fake).sum()
            loss.backward(retain_graph=True)
            optimizer.step()  # WRITE
        return tuple(p.grad for p in generator.parameters())

    def right():
        return grads(critic(generator(noise)).sum(), *generator.parameters())

    return wrong, right


@bug("https://github.com/1Konny/FactorVAE/issues/15")
def autoencoder_steps_before_the_discriminator_loss():
    encoder, discriminator = nn.Linear(3, 2), nn.Linear(2, 2)
    x = torch.randn(6, 3)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *discriminator.parameters()], lr=0.1, foreach=True)

    def wrong():
        scores = discriminator(encoder(x))  # SAVE
        vae_loss = scores.sum()
        vae_loss.backward(retain_graph=True)
        optimizer.step()  # WRITE
        return grads(scores.square().sum(), *encoder.parameters())

    def right():
        return grads(discriminator(encoder(x)).square().sum(), *encoder.parameters())

    return wrong, right


# A fused step raises no version: what torch refuses of the other optimizers, it does silently wrong here.
@bug("https://github.com/thu-ml/tianshou/issues/37", plain="silent")
def critic_steps_before_the_actor_of_sac():
    actor, critic = nn.Linear(3, 2), nn.Linear(5, 1)
    state, optimizer = torch.randn(4, 3), torch.optim.Adam(critic.parameters(), lr=0.1, fused=True)

    def wrong():
        action = actor(state)
        actor_loss = -critic(torch.cat([state, action], 1)).mean()  # SAVE
        critic(torch.cat([state, action.detach()], 1)).square().mean().backward()
        optimizer.step()  # WRITE
        return grads(actor_loss, *actor.parameters())

    def right():
        return grads(-critic(torch.cat([state, actor(state)], 1)).mean(), *actor.parameters())

    return wrong, right


@bug("https://github.com/toshikwa/soft-actor-critic.pytorch/issues/1")
def policy_loss_computed_before_the_critic_is_updated_by_hand():
    policy, q, state = nn.Linear(3, 2), leaf(2, 1), torch.randn(4, 3)

    def wrong():
        policy_loss = (policy(state) @ q).mean()  # SAVE
        with torch.no_grad():
            q.sub_(0.1)  # WRITE
        return grads(policy_loss, *policy.parameters())

    def right():
        return grads((policy(state) @ q).mean(), *policy.parameters())

    return wrong, right


@bug("https://github.com/norse/norse/issues/163")
def state_carried_over_an_optimizer_step():
    cell, x = nn.Linear(3, 3), torch.randn(2, 4, 3)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)

    def wrong():
        state = torch.zeros(4, 3)
        first = cell(x[0] + state)
        second = cell(x[1] + first)  # SAVE
        first.sum().backward(retain_graph=True)
        optimizer.step()  # WRITE
        return grads(second.sum(), *cell.parameters())

    def right():
        return grads(cell(x[1] + cell(x[0])).sum(), *cell.parameters())

    return wrong, right


@bug("https://github.com/martinarjovsky/WassersteinGAN/issues/32", plain="silent")
def critic_clipped_through_data_before_backward():
    critic, x = nn.Linear(3, 1), leaf(4, 3)

    def wrong():
        score = critic(x)  # SAVE
        for p in critic.parameters():
            p.data.clamp_(-0.01, 0.01)  # WRITE
        return grads(score.sum(), x)

    def right():
        return grads(critic(x).sum(), x)

    return wrong, right


@bug("https://github.com/ultralytics/yolov5/issues/5240", plain="silent")
def target_network_averaged_through_its_state_dict():
    target, online, x = nn.Linear(3, 2), nn.Linear(3, 2), leaf(4, 3)

    def wrong():
        loss = target(x).square().sum()  # SAVE
        for name, value in target.state_dict().items():
            value.detach().data.mul_(0.9)  # WRITE
            value.data.add_(online.state_dict()[name], alpha=0.1)
        return grads(loss, x)

    def right():
        return grads(target(x).square().sum(), x)

    return wrong, right


@bug("https://github.com/ufal/npfl122/pull/81", plain="silent")
def target_network_averaged_with_out():
    target, online, x = leaf(3, 2), torch.randn(3, 2), leaf(4, 3)

    def wrong():
        loss = (x @ target).square().sum()  # SAVE
        torch.add(target.data, online, alpha=0.5, out=target.data)  # WRITE
        return grads(loss, x)

    def right():
        return grads((x @ target).square().sum(), x)

    return wrong, right
