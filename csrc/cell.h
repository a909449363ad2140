// The cell's maths, shared by every C++ kernel: f, and multiplication by f' which needs the state h = f(a) alone.
//
// Include it inside a kernel's namespace, after that namespace has its tanh for the value type V (a SIMD vector on a
// CPU). A new cell is a struct here and its twin in rnnkern/reference.py.

struct Tanh {
  template <class V>
  static RNNKERN_INLINE V f(V a) {
    return tanh_vector(a);
  }
  template <class V>
  static RNNKERN_INLINE V times_derivative(V g, V h) {
    return g * (1 - h * h);
  }
};

// Comparisons are written so that NaN passes through, as it does in PyTorch.
struct Relu {
  template <class V>
  static RNNKERN_INLINE V f(V a) {
    return a < 0 ? V{} : a;
  }
  template <class V>
  static RNNKERN_INLINE V times_derivative(V g, V h) {
    return h <= 0 ? V{} : g;
  }
};
