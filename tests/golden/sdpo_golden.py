#!/usr/bin/env python3
"""Golden values of the SDPO loss: writes sdpo_golden.json beside itself. Plain Python, doubles, no packages.

Every formula is written out the long way; gradients are central differences. One row of six logits; the cases
cover the Python system's loss ("teacher_topk"), the student's top K with a tail bucket, and the whole vocabulary.
"""
import json
import math
import pathlib

STUDENT = [2.0, 1.0, 0.5, -0.5, 0.0, -1.0]
TEACHER = [1.0, 2.5, 0.0, 0.5, -1.0, -0.5]
ROLLOUT, BASE, K = -1.9, -2.1, 3


def log_softmax(z):
    m = max(z)
    lse = m + math.log(sum(math.exp(x - m) for x in z))
    return [x - lse for x in z]


def top(values):
    return sorted(range(len(values)), key=lambda i: -values[i])[:K]


def clamp(x):
    return max(-20.0, min(20.0, x))


def jensen_shannon(s, t, alpha):
    """(1-a) KL(S||M) + a KL(T||M), M = (1-a) S + a T."""
    m = [(1 - alpha) * a + alpha * b for a, b in zip(s, t)]
    return ((1 - alpha) * sum(a * math.log(a / c) for a, c in zip(s, m))
            + alpha * sum(b * math.log(b / c) for b, c in zip(t, m)))


def divergence(s, t, alpha):
    if alpha == 0:
        return sum(b * math.log(b / a) for a, b in zip(s, t))
    if alpha == 1:
        return sum(a * math.log(a / b) for a, b in zip(s, t))
    return jensen_shannon(s, t, alpha)


def teacher_topk(z, alpha, token, at=None):
    """`at`: the logits whose value the detached coefficient of the token form has."""
    lp, tau = log_softmax(z), log_softmax(TEACHER)
    ids = top(tau)
    if alpha < 1:
        s = [math.exp(lp[i]) for i in ids]
        t = [math.exp(tau[i]) for i in ids]
        zs, zt = max(sum(s), 1e-8), max(sum(t), 1e-8)
        return jensen_shannon([x / zs for x in s], [x / zt for x in t], alpha)
    floor = tau[token] if token in ids else -20.0
    return (log_softmax(at or z)[token] - floor) * lp[token]


def student_topk_tail(z, alpha, token, at=None):
    lp, tau = log_softmax(z), log_softmax(TEACHER)
    ids = top(log_softmax(at or z))

    def buckets(logs):
        lse = min(math.log(sum(math.exp(logs[i]) for i in ids)), -1e-7)
        return [math.exp(logs[i]) for i in ids] + [-math.expm1(lse)]
    return divergence(buckets(lp), buckets(tau), alpha)


def full(z, alpha, token, at=None):
    return divergence([math.exp(x) for x in log_softmax(z)], [math.exp(x) for x in log_softmax(TEACHER)], alpha)


def gradient(f, h=1e-5):
    result = []
    for i in range(len(STUDENT)):
        up, down = STUDENT[:], STUDENT[:]
        up[i] += h
        down[i] -= h
        result.append((f(up) - f(down)) / (2 * h))
    return result


def case(function, alpha, token, is_clip, kl_weight, reference_k3):
    lp = log_softmax(STUDENT)[token]
    ratio = min(math.exp(clamp(lp - ROLLOUT)), is_clip)

    def k3(z):
        gap = log_softmax(z)[token] - BASE
        x = clamp(gap if reference_k3 else -gap)
        return math.exp(x) - 1 - x

    def total(z):
        return ratio * function(z, alpha, token, STUDENT) + kl_weight * k3(z)
    value = function(STUDENT, alpha, token)
    return {
        'variant': function.__name__, 'alpha': alpha, 'top_k': K, 'token': token, 'is_clip': is_clip,
        'kl_weight': kl_weight, 'reference_k3': reference_k3,
        'divergence': value, 'ratio': ratio, 'weighted': ratio * value, 'k3': k3(STUDENT), 'total': total(STUDENT),
        'divergence_gradient': gradient(lambda z: function(z, alpha, token, STUDENT)),
        'gradient': gradient(total),
    }


def main():
    cases = [case(teacher_topk, alpha, 2, 5.0, 0.1, True) for alpha in (0.5, 0.25, 0.0, 1.0)]
    cases.append(case(teacher_topk, 1.0, 1, 5.0, 0.1, True))
    cases.append(case(teacher_topk, 1.0, 1, 1.2, 0.1, False))
    for function in (student_topk_tail, full):
        cases += [case(function, alpha, 2, 2.0, 0.1, False) for alpha in (0.5, 0.25, 0.0, 1.0)]
    golden = {'student_logits': STUDENT, 'teacher_logits': TEACHER, 'rollout_logprob': ROLLOUT, 'base_logprob': BASE,
              'student_logprobs': log_softmax(STUDENT), 'teacher_logprobs': log_softmax(TEACHER),
              'teacher_top_ids': top(TEACHER), 'cases': cases}
    path = pathlib.Path(__file__).with_name('sdpo_golden.json')
    path.write_text(json.dumps(golden, indent=1) + '\n')


if __name__ == '__main__':
    main()
