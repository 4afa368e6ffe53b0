// Update rules on one element: the rules of jadam/_optimizers, for compiled kernels.
//
// A rule is a struct with its Python name, the number of its moments, whether they may be int8, `update_moments`, and
// `direction`, which gets sqrt(v) because int8 moments compute it in another way. `Rules`, at the end, must list it.
// The tests compare each rule with its Python form.

#ifndef JADAM_RULES_H_
#define JADAM_RULES_H_

#include "portable.h"

namespace jadam {

// The scalars of one step, float32. The library exports these names, so that Python knows their order. The kernel
// multiplies by inverse corrections, 1 / (1 - b**t), where Python divides by corrections.
#define JADAM_SCALARS(X)                                                                        \
  X(b1) X(one_minus_b1) X(inverse_correction1)                                                  \
  X(b2) X(one_minus_b2) X(inverse_correction2) X(inverse_sqrt_correction2)                      \
  X(next_momentum) X(inverse_next_momentum_correction)   /* NAdam */                            \
  X(one_minus_momentum) X(inverse_momentum_correction)   /* NAdam */                            \
  X(eps) X(eps_root)                                                                            \
  X(trusted) X(rectification)                            /* RAdam */                            \
  X(minus_lr) X(weight_decay)                                                                   \
  X(bound) X(norm) X(max_norm)                           /* gradient clipping */

struct Scalars {
#define JADAM_FIELD(name) float name;
  JADAM_SCALARS(JADAM_FIELD)
#undef JADAM_FIELD
};

// x / y, and x where y is 0.
template <bool kNotZero>  // y != 0 is known
JADAM_INLINE float divide(float x, float y) {
  return x / (kNotZero || y != 0.0f ? y : 1.0f);
}

// b * average + (1-b) * x as the term with the larger weight plus a change, as `ema` of jadam/_core/numerics.py.
template <bool kLargeB>  // b >= 1/2 is known
JADAM_INLINE float ema(float b, float one_minus_b, float average, float x) {
  if (kLargeB || b >= 0.5f) return average + one_minus_b * (x - average);
  return x + b * (average - x);
}

// The maximum; NaN if x or y is NaN, and -infinity if x is. Where g * g overflows, the average v is NaN, or -infinity
// if the compiler contracts it to a fused multiply-add. Neither must be lost.
JADAM_INLINE float maximum(float x, float y) { return !(x >= kLowestFinite) || x > y ? x : y; }

enum Clipping { kBound = 1, kNorm = 2, kClippings = 4 };  // bits: gradients are clipped by value, by norm

JADAM_INLINE float clip_to_bound(const Scalars& s, float g) {
  g = g > s.bound ? s.bound : g;
  return g < -s.bound ? -s.bound : g;
}

// `norm` and `max_norm` are both 1 where the norm of all gradients is within the limit.
JADAM_INLINE float clip_by_norm(const Scalars& s, float g) { return g / s.norm * s.max_norm; }

JADAM_INLINE float new_parameter(const Scalars& s, bool weight_decay, float p, float u) {
  if (weight_decay) u = u + s.weight_decay * p;
  return p + s.minus_lr * u;
}

// The moments of one element.
struct Moments {
  float m, v, v_max;
};

// Whether the scalars are as in most steps, which saves work per element: `kCommonScalars` of the rules.
JADAM_INLINE bool has_common_scalars(const Scalars& s) {
  return s.b1 >= 0.5f && s.b2 >= 0.5f && s.eps_root == 0.0f && s.eps > 0.0f;
}

// Adam (Kingma & Ba 2015, Algorithm 1). kNesterov: NAdam. kRectified: RAdam.
template <bool kNesterov, bool kRectified>
struct AdamRule {
  static constexpr int kMoments = 2;
  static constexpr bool kInt8 = !kRectified;

  template <bool kCommonScalars>
  static JADAM_INLINE void update_moments(const Scalars& s, float g, Moments& x) {
    x.m = ema<kCommonScalars>(s.b1, s.one_minus_b1, x.m, g);
    x.v = ema<kCommonScalars>(s.b2, s.one_minus_b2, x.v, g * g);
  }

  template <bool kCommonScalars>
  static JADAM_INLINE float direction(const Scalars& s, float g, const Moments& x, float sqrt_v) {
    float m_hat = x.m * s.inverse_correction1;
    if (kNesterov) {
      m_hat = s.next_momentum * x.m * s.inverse_next_momentum_correction +
              s.one_minus_momentum * g * s.inverse_momentum_correction;
    }
    const float root =
        kCommonScalars ? sqrt_v * s.inverse_sqrt_correction2 : sqrt_of(x.v * s.inverse_correction2 + s.eps_root);
    const float u = divide<kCommonScalars>(m_hat, root + s.eps);
    if (kRectified) return s.trusted != 0.0f ? s.rectification * u : m_hat;
    return u;
  }
};

struct Adam : AdamRule<false, false> {
  static JADAM_INLINE constexpr const char* name() { return "adam"; }
};
struct NAdam : AdamRule<true, false> {
  static JADAM_INLINE constexpr const char* name() { return "nadam"; }
};
struct RAdam : AdamRule<false, true> {
  static JADAM_INLINE constexpr const char* name() { return "radam"; }
};
struct NesterovRAdam : AdamRule<true, true> {
  static JADAM_INLINE constexpr const char* name() { return "nesterov_radam"; }
};

// AdaMax (Kingma & Ba 2015, Algorithm 2).
struct AdaMax {
  static JADAM_INLINE constexpr const char* name() { return "adamax"; }
  static constexpr int kMoments = 2;
  static constexpr bool kInt8 = false;

  template <bool kCommonScalars>
  static JADAM_INLINE void update_moments(const Scalars& s, float g, Moments& x) {
    x.m = ema<kCommonScalars>(s.b1, s.one_minus_b1, x.m, g);
    x.v = maximum(s.b2 * x.v, abs_of(g) + s.eps);
  }

  template <bool kCommonScalars>
  static JADAM_INLINE float direction(const Scalars& s, float, const Moments& x, float) {
    return divide<kCommonScalars>(x.m * s.inverse_correction1, x.v);
  }
};

// AMSGrad (Reddi, Kale & Kumar 2018). v_max is the maximum of v_hat so far, or of v with kMaxOfV.
template <bool kMaxOfV>
struct AMSGradRule {
  static constexpr int kMoments = 3;
  static constexpr bool kInt8 = false;

  template <bool kCommonScalars>
  static JADAM_INLINE void update_moments(const Scalars& s, float g, Moments& x) {
    x.m = ema<kCommonScalars>(s.b1, s.one_minus_b1, x.m, g);
    x.v = ema<kCommonScalars>(s.b2, s.one_minus_b2, x.v, g * g);
    x.v_max = maximum(kMaxOfV ? x.v : x.v * s.inverse_correction2, x.v_max);
  }

  template <bool kCommonScalars>
  static JADAM_INLINE float direction(const Scalars& s, float, const Moments& x, float) {
    const float root = sqrt_of(x.v_max), correction = kMaxOfV ? s.inverse_correction2 : 1.0f;
    const float root_hat = kMaxOfV ? root * s.inverse_sqrt_correction2 : root;
    return divide<kCommonScalars>(x.m * s.inverse_correction1,
                  (kCommonScalars ? root_hat : sqrt_of(x.v_max * correction + s.eps_root)) + s.eps);
  }
};

struct AMSGrad : AMSGradRule<false> {
  static JADAM_INLINE constexpr const char* name() { return "amsgrad"; }
};
struct AMSGradMaxOfV : AMSGradRule<true> {
  static JADAM_INLINE constexpr const char* name() { return "amsgrad_max_of_v"; }
};

// Updates the moments and returns the new parameter.
template <class Rule, bool kCommonScalars>
JADAM_INLINE float update(const Scalars& s, bool weight_decay, float g, float p, Moments& x) {
  Rule::template update_moments<kCommonScalars>(s, g, x);
  return new_parameter(s, weight_decay, p, Rule::template direction<kCommonScalars>(s, g, x, sqrt_of(x.v)));
}

// The type at a position.
template <int number, class First, class... R>
struct Nth : Nth<number - 1, R...> {};
template <class First, class... R>
struct Nth<0, First, R...> {
  using Type = First;
};

// A list of rules; a rule's number is its position.
template <class... R>
struct List {
  static constexpr int kCount = sizeof...(R);

  template <int number>
  using At = typename Nth<number, R...>::Type;

  // Calls f(R{}) for the rule R with this number.
  template <class F>
  static JADAM_INLINE void visit(int number, F&& f) {
    int i = 0;
    ((number == i++ ? f(R{}) : void()), ...);
  }
};
using Rules = List<Adam, NAdam, AdaMax, AMSGrad, AMSGradMaxOfV, RAdam, NesterovRAdam>;

}  // namespace jadam

#endif  // JADAM_RULES_H_
