// Adam and its relatives on one element: the rules of jadam/_optimizers, written a second time for kernels.
//
// A rule is a struct with its name in Python, the number of its moments, whether int8 holds them, and `direction`; it is
// listed in `Rules`, at the end. The tests hold each rule and its Python form together.

#ifndef JADAM_RULES_H_
#define JADAM_RULES_H_

#include "portable.h"

namespace jadam {

// The scalars of one step, float32. Python finds their order by these names, which the library exports.
#define JADAM_SCALARS(X)                                                                        \
  X(b1) X(one_minus_b1) X(correction1)              /* corrections are 1 / (1 - b**t) */        \
  X(b2) X(one_minus_b2) X(correction2) X(root_correction2)                                      \
  X(next) X(next_correction) X(newest) X(newest_correction)  /* NAdam's look ahead */           \
  X(eps) X(eps_root)                                                                            \
  X(trusted) X(rectification)                       /* RAdam's */                               \
  X(minus_lr) X(weight_decay)                                                                   \
  X(bound) X(norm) X(max_norm)                      /* of the gradient's clipping */

struct Scalars {
#define JADAM_FIELD(name) float name;
  JADAM_SCALARS(JADAM_FIELD)
#undef JADAM_FIELD
};

JADAM_INLINE float divide(float x, float y) { return x / (y == 0.0f ? 1.0f : y); }

// b * average + (1-b) * x, the correction on the term with the larger weight. kSlow: b is at least 1/2.
template <bool kSlow>
JADAM_INLINE float ema(float b, float one_minus_b, float average, float x) {
  if (kSlow || b >= 0.5f) return average + one_minus_b * (x - average);
  return x + b * (average - x);
}

// NaN if either is, -infinity if x is: where g * g overflows, v is NaN as written but -infinity contracted.
JADAM_INLINE float maximum(float x, float y) { return !(x >= kLowest) || x > y ? x : y; }

// The moments of one element: the direction reads and writes them. `root` is sqrt(v), for formats that store it.
struct Moments {
  float m, v, largest, root;
};

// kUsual: b1 and b2 are at least 1/2 and eps_root is 0. Everywhere the reciprocals of what Python divides by multiply,
// where that is a scalar.

// Adam (Kingma & Ba 2015, Algorithm 1); kNesterov: NAdam; kRectified: RAdam.
template <bool kNesterov, bool kRectified>
struct AdamRule {
  static constexpr int kMoments = 2;
  static constexpr bool kInt8 = !kRectified;

  template <bool kUsual>
  static JADAM_INLINE float direction(const Scalars& s, float g, Moments& x) {
    x.m = ema<kUsual>(s.b1, s.one_minus_b1, x.m, g);
    x.v = ema<kUsual>(s.b2, s.one_minus_b2, x.v, g * g);
    float m_hat = x.m * s.correction1;
    if (kNesterov) m_hat = s.next * x.m * s.next_correction + s.newest * g * s.newest_correction;
    x.root = root_of(x.v);
    const float root = kUsual ? x.root * s.root_correction2 : root_of(x.v * s.correction2 + s.eps_root);
    const float u = divide(m_hat, root + s.eps);
    if (kRectified) return s.trusted != 0.0f ? s.rectification * u : m_hat;
    return u;
  }
};

struct Adam : AdamRule<false, false> {
  static constexpr const char* name() { return "adam"; }
};
struct NAdam : AdamRule<true, false> {
  static constexpr const char* name() { return "nadam"; }
};
struct RAdam : AdamRule<false, true> {
  static constexpr const char* name() { return "radam"; }
};
struct RAdamOfNAdam : AdamRule<true, true> {
  static constexpr const char* name() { return "radam_of_nadam"; }
};

// Kingma & Ba 2015, Algorithm 2.
struct AdaMax {
  static constexpr const char* name() { return "adamax"; }
  static constexpr int kMoments = 2;
  static constexpr bool kInt8 = false;

  template <bool kUsual>
  static JADAM_INLINE float direction(const Scalars& s, float g, Moments& x) {
    x.m = ema<kUsual>(s.b1, s.one_minus_b1, x.m, g);
    x.v = maximum(s.b2 * x.v, magnitude(g) + s.eps);
    return divide(x.m * s.correction1, x.v);
  }
};

// AMSGrad (Reddi, Kale & Kumar 2018): the largest v_hat so far; kOfV: the largest v.
template <bool kOfV>
struct AMSGradRule {
  static constexpr int kMoments = 3;
  static constexpr bool kInt8 = false;

  template <bool kUsual>
  static JADAM_INLINE float direction(const Scalars& s, float g, Moments& x) {
    x.m = ema<kUsual>(s.b1, s.one_minus_b1, x.m, g);
    x.v = ema<kUsual>(s.b2, s.one_minus_b2, x.v, g * g);
    x.largest = maximum(kOfV ? x.v : x.v * s.correction2, x.largest);
    const float root = root_of(x.largest), correction = kOfV ? s.correction2 : 1.0f;
    const float root_hat = kOfV ? root * s.root_correction2 : root;
    return divide(x.m * s.correction1,
                  (kUsual ? root_hat : root_of(x.largest * correction + s.eps_root)) + s.eps);
  }
};

struct AMSGrad : AMSGradRule<false> {
  static constexpr const char* name() { return "amsgrad"; }
};
struct AMSGradOfV : AMSGradRule<true> {
  static constexpr const char* name() { return "amsgrad_of_v"; }
};

// All rules; a rule's number is its place here.
template <class... R>
struct List {
  static constexpr int kCount = sizeof...(R);

  // f(R{}) of the rule with this number.
  template <class F>
  static JADAM_INLINE void visit(int number, F&& f) {
    int i = 0;
    ((number == i++ ? f(R{}) : void()), ...);
  }
};
using Rules = List<Adam, NAdam, AdaMax, AMSGrad, AMSGradOfV, RAdam, RAdamOfNAdam>;

}  // namespace jadam

#endif  // JADAM_RULES_H_
