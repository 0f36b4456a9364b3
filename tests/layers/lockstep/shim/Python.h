// The operators' schemas stand in the file of the Python module, which nobody imports here.
#pragma once

struct PyModuleDef {
  int head;
  const char *name, *doc;
  long size;
  void *methods, *slots, *traverse, *clear, *free;
};

#define PyModuleDef_HEAD_INIT 0
#define PyMODINIT_FUNC extern "C" void*
#define PyModule_Create(definition) (definition)
