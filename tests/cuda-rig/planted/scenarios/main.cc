#include <cstring>

#include "scenarios.h"

static Scenario* scenarios = nullptr;

Scenario::Scenario(const char* name, void (*body)()) : name(name), body(body), next(scenarios) {
  scenarios = this;
}

int main(int count, char** words) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  for (Scenario* one = scenarios; one; one = one->next) {
    if (count != 2 || strcmp(one->name, words[1])) continue;
    one->body();
    return 0;
  }
  fprintf(stderr, "scenarios: one argument, the name of a scenario\n");
  return 2;
}
