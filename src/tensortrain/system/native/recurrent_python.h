// What Python sees of recurrent_function.h: a direction of a layer, and the short way through whole layers and cells.
#pragma once

#include "recurrent_call.h"

namespace tensortrain::recurrent {

// Numbers of (kind, size, n_steps, batch, whether time comes first, whether it runs backwards, whether torch's kernel
// runs), and of the examples of
// every step where they are packed; none where these are not the examples of a sequence that becomes narrower.
inline std::optional<Course> course_of(const Sizes& numbers, const std::optional<Tensor>& counts) {
  auto course = course_of(numbers);
  if (counts) {
    if (counts->numel() != course.n_steps) return std::nullopt;
    const auto whole = counts->contiguous();
    const auto* const given = whole.const_data_ptr<int64_t>();
    course.pack({given, given + course.n_steps});
    course.stride = 1;
    // Rows that belong to no example would stay unwritten.
    const bool shrinks = std::is_sorted(course.count.rbegin(), course.count.rend());
    if (!shrinks || course.count.front() != course.batch || course.count.back() < 1) return std::nullopt;
  }
  return course;
}

// (sweep, ready sweep, whether stored tensors are turned, tensors, bias) as sequences.py gives it.
struct GivenMap {
  Map map;
  Tensors tensors;
  Bias bias;

  explicit GivenMap(const py::object& given) {
    if (given.is_none()) return;
    const auto parts = given.cast<py::tuple>();
    map = {parts[0].cast<c10::intrusive_ptr<Sweep>>(), parts[1].cast<c10::intrusive_ptr<Sweep>>(), parts[2].cast<bool>()};
    tensors = parts[3].cast<Tensors>();
    bias = parts[4].cast<Bias>();
  }
};

// The last states, then the outputs as rows; nothing where the tensors are no plain ones.
inline std::optional<Tensors> run(const Sizes& numbers, const std::optional<Tensor>& counts, const py::object& input_map,
                                  const py::object& hidden_map, const Tensor& x, const Tensors& states) {
  const auto course = course_of(numbers, counts);
  if (!course) return std::nullopt;
  const GivenMap input(input_map), hidden(hidden_map);
  const Job job{*course, input.map, hidden.map, input.bias.has_value(), hidden.bias.has_value(), true,
                numbers[6] != 0};
  auto all = together(x, states, input.bias, hidden.bias, input.tensors, hidden.tensors);
  if (states.size() != job.n_states() || all.size() != job.n_tensors() || !fits(job, all)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return call(job, std::move(all));
}

inline void bind(py::module_& m) {
  m.def("recur", &run);
  py::class_<RecurrentWay>(m, "RecurrentWay", py::custom_type_setup([](PyHeapTypeObject* type) {
                             type->ht_type.tp_call = &call_recurrent;
                           }))
      .def(py::init<py::tuple, py::list, py::dict, py::dict>())
      .def("keep", &RecurrentWay::keep)
      .def("forget", &RecurrentWay::forget)
      .def("__reduce__", [](const py::object&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
}

}  // namespace tensortrain::recurrent
