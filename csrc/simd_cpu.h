// Vectors of W floats, complex numbers made of such vectors, and discrete Fourier transforms of 2 to 8 of them. Each
// CPU kernel includes this file inside its anonymous namespace, has its own W, and is compiled once per instruction
// set.
typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

struct Complex {
  vf re, im;
};
inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(float s, Complex a) { return {s * a.re, s * a.im}; }
inline Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
inline Complex times(Complex a, const float* w) { return {a.re * w[0] - a.im * w[1], a.re * w[1] + a.im * w[0]}; }

inline void dft(Complex (&a)[2]) {
  const Complex t = a[0] - a[1];
  a[0] = a[0] + a[1];
  a[1] = t;
}
inline void dft(Complex (&a)[3]) {
  constexpr float s1 = 0.86602540378443865f;
  const Complex p = a[1] + a[2], m = s1 * times_minus_i(a[1] - a[2]), r = a[0] - 0.5f * p;
  a[0] = a[0] + p, a[1] = r + m, a[2] = r - m;
}
inline void dft(Complex (&a)[4]) {
  const Complex s = a[0] + a[2], d = a[0] - a[2], t = a[1] + a[3], e = times_minus_i(a[1] - a[3]);
  a[0] = s + t, a[1] = d + e, a[2] = s - t, a[3] = d - e;
}
inline void dft(Complex (&a)[5]) {
  constexpr float c1 = 0.30901699437494742f, c2 = -0.80901699437494742f, s1 = 0.95105651629515357f,
                  s2 = 0.58778525229247313f;
  const Complex p = a[1] + a[4], q = a[2] + a[3], m = times_minus_i(a[1] - a[4]), n = times_minus_i(a[2] - a[3]);
  const Complex r = a[0] + c1 * p + c2 * q, s = a[0] + c2 * p + c1 * q, u = s1 * m + s2 * n, v = s2 * m - s1 * n;
  a[0] = a[0] + p + q, a[1] = r + u, a[2] = s + v, a[3] = s - v, a[4] = r - u;
}
inline void dft(Complex (&a)[7]) {
  constexpr float c1 = 0.62348980185873353f, c2 = -0.22252093395631440f, c3 = -0.90096886790241913f,
                  s1 = 0.78183148246802981f, s2 = 0.97492791218182361f, s3 = 0.43388373911755812f;
  const Complex p = a[1] + a[6], q = a[2] + a[5], r = a[3] + a[4];
  const Complex l = times_minus_i(a[1] - a[6]), m = times_minus_i(a[2] - a[5]), n = times_minus_i(a[3] - a[4]);
  const Complex x = a[0] + c1 * p + c2 * q + c3 * r, u = s1 * l + s2 * m + s3 * n;
  const Complex y = a[0] + c2 * p + c3 * q + c1 * r, v = s2 * l - s3 * m - s1 * n;
  const Complex z = a[0] + c3 * p + c1 * q + c2 * r, w = s3 * l - s1 * m + s2 * n;
  a[0] = a[0] + p + q + r;
  a[1] = x + u, a[2] = y + v, a[3] = z + w, a[4] = z - w, a[5] = y - v, a[6] = x - u;
}
inline void dft(Complex (&a)[8]) {
  constexpr float h = 0.70710678118654752f;
  Complex even[4] = {a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]};
  const Complex d1 = a[1] - a[5], d3 = a[3] - a[7];
  Complex odd[4] = {a[0] - a[4],
                    {(d1.re + d1.im) * h, (d1.im - d1.re) * h},
                    times_minus_i(a[2] - a[6]),
                    {(d3.im - d3.re) * h, (d3.re + d3.im) * -h}};
  dft(even), dft(odd);
  for (int q = 0; q < 4; ++q) a[2 * q] = even[q], a[2 * q + 1] = odd[q];
}

// ---- Rows to vectors and back ----

#if defined(__clang__) || __GNUC__ >= 12
#define AJEPA_SHUFFLE __builtin_shufflevector
#else
#define AJEPA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
template <int H, int... I>
inline void exchange(vf& a, vf& b, std::integer_sequence<int, I...>) {
  const vf low = AJEPA_SHUFFLE(a, b, (I & H ? W + I - H : I)...);
  b = AJEPA_SHUFFLE(a, b, (I & H ? W + I : I + H)...);
  a = low;
}
template <int H = W / 2>
inline void transpose(vf (&rows)[W]) {
  for (int i = 0; i < W; ++i)
    if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, W>{});
  if constexpr (H > 1) transpose<H / 2>(rows);
}
