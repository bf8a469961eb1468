//! Shell scripts, held against the host's own shell.

use super::{Ran, boot, sh};
use std::{path::Path, process::Command};

/// Scripts whose outcome does not depend on the machine. They run in an empty directory.
const SCRIPTS: &[&str] = &[
    "echo hi",
    "echo a b   c; echo 'a  b' \"c  d\" e\\ f",
    "x=1; y=\"$x 2\"; echo $x $y \"${y}z\" ${x}y '$x'",
    "true && echo yes || echo no; false && echo yes || echo no",
    "! true; echo $?; ! false; echo $?",
    "false; echo $?; (exit 3); echo $?; sh -c 'exit 7'; echo $?",
    "if true; then echo a; elif true; then echo b; else echo c; fi",
    "if false; then echo a; elif true; then echo b; else echo c; fi",
    "if false; then echo a; fi; echo $?",
    "i=0; while [ $i -lt 5 ]; do echo $i; i=$((i + 1)); done",
    "i=0; until [ $i -ge 3 ]; do i=$((i+1)); done; echo $i",
    "for i in a b 'c d' $(echo e f); do echo \"<$i>\"; done",
    "for i in 1 2 3 4 5; do if [ $i = 2 ]; then continue; fi; if [ $i = 4 ]; then break; fi; echo $i; done",
    "for i in 1 2; do for j in a b c; do [ $j = b ] && continue 2; echo $i$j; done; done",
    "for i in 1 2; do for j in a b c; do [ $j = b ] && break 2; echo $i$j; done; done; echo end",
    "while true; do while true; do break 2; done; done; echo out",
    "echo one | cat | tr a-z A-Z",
    "printf 'b\\na\\nc\\n' | sort | head -n 2",
    "seq 1 1000 | wc -l | tr -d ' '",
    "seq 100000 | tail -n 1",
    "yes | head -n 3",
    "echo hi > f; cat f; echo more >> f; cat < f; wc -c < f | tr -d ' '",
    "echo err >&2; echo out",
    "{ echo out; echo err >&2; } > both 2>&1; cat both",
    "ls nosuch 2> /dev/null || echo none",
    "(echo in; cd /; pwd); pwd > /dev/null; echo out",
    "x=1; (x=2; echo $x); echo $x",
    "f() { echo \"$1 $# $@\"; return 4; }; f a 'b c'; echo $?",
    "f() { x=inner; local y=l; echo $y; }; x=outer; y=o; f; echo $x $y",
    "set -- a 'b c' d; echo $# \"$1\" \"$2\"; shift; echo \"$@\"; for i in \"$@\"; do echo \"[$i]\"; done",
    "set -- a 'b c'; for i in $@; do echo \"[$i]\"; done; for i in \"$*\"; do echo \"[$i]\"; done",
    "set --; for i in \"$@\"; do echo x; done; echo \"$#\"; echo \"a$@b\"",
    "unset x; echo ${x:-default} ${x-default} \"${x:=set}\" $x ${x:+alt} ${y+alt}",
    "x=; echo \"[${x:-e}]\" \"[${x-e}]\" \"[${x:+a}]\" \"[${x+a}]\"",
    "x=a.b.c; echo ${x%.*} ${x%%.*} ${x#*.} ${x##*.} ${#x}",
    "p=/usr/lib/file.tar.gz; echo ${p##*/} ${p%/*} ${p%.gz}",
    "echo $((1 + 2 * 3)) $(((1 + 2) * 3)) $((10 / 3)) $((10 % 3)) $((-7 / 2)) $((1 << 4 | 3))",
    "a=5; echo $((a + 1)) $(($a * 2)) $((a > 3 ? 10 : 20)) $((a == 5 && a != 4)) $((!a))",
    "a=1; echo $((a += 4)) $a; echo $((0x1f)) $((010)); echo $((~0))",
    "echo $(echo nested $(echo deep)); echo `echo back`; echo \"$(printf 'a\\nb\\n\\n')\"",
    "x=$(false); echo $?; x=$(exit 5) y=1; echo $?",
    "case hello in h*o) echo match;; *) echo no;; esac",
    "case abc in a|b) echo 1;; [xa]?c) echo 2;; esac",
    "case x in y) echo no;; esac; echo $?",
    "case '*' in '*') echo star;; esac; case ab in \"a*\") echo no;; *) echo quoted;; esac",
    "cat <<EOF\nhello $((1+1)) `echo x`\n\tindent \\$keep\nEOF",
    "cat <<'EOF'\nno $expansion `here`\nEOF",
    "cat <<-EOF\n\tstripped\n\tEOF\necho after",
    "cat <<A; cat <<B\nfirst\nA\nsecond\nB",
    "x='a b'; printf '[%s]' $x; printf '[%s]' \"$x\"; echo",
    "IFS=:; x=a:b::c; for i in $x; do echo \"[$i]\"; done",
    "IFS=,; set -- a b c; echo \"$*\"",
    "x='  lead trail  '; echo $x; echo \"$x\"; for i in $x; do echo \"[$i]\"; done",
    "touch b.txt a.txt c.dat; echo *.txt; echo *; echo nope*; echo '*.txt' \"*.txt\" \\*",
    "mkdir d; touch d/x d/y; echo d/*; echo */x; echo [a-d]; echo d/?",
    "touch .hid vis; echo *; echo .h*",
    "echo a; exit 3; echo b",
    "trap 'echo bye' EXIT; echo hi",
    "trap 'echo bye $?' EXIT; exit 4",
    "trap 'echo got; exit 9' TERM; kill -TERM $$; echo not",
    "trap '' TERM; kill -TERM $$; echo still",
    "trap 'echo one' USR1; kill -USR1 $$; echo two",
    "sleep 0 & wait $!; echo $?",
    "sh -c 'exit 6' & wait $!; echo $?",
    "sleep 100 & p=$!; kill $p; wait $p 2>/dev/null; echo $?",
    "sh -c 'kill -9 $$' 2>/dev/null; echo $?",
    "set -e; echo a; false; echo b",
    "set -e; if false; then :; fi; false || echo kept; ! true; echo c; (exit 2); echo d",
    "set -e; f() { false; echo in; }; f && echo x; f; echo y",
    "set -u; echo ${x:-ok}; echo $undefined_variable; echo not",
    "set -f; echo *; set +f",
    "eval 'x=1; echo $x'; eval echo '\"a  b\"'",
    "echo 'echo sourced $1; y=7' > s.sh; . ./s.sh; echo $y",
    "echo 'echo script $0 $1' > s.sh; sh s.sh arg",
    "sh -c 'echo $0 $1' zero one",
    "nosuchcommand 2>/dev/null; echo $?; ./nosuch 2>/dev/null; echo $?; touch x; ./x 2>/dev/null; echo $?",
    "export A=1; B=2; sh -c 'echo $A-$B'; C=3 sh -c 'echo $C'; echo [$C]",
    "x=1; readonly x; (x=2) 2>/dev/null; echo $? $x",
    "read a b <<E\none two three\nE\necho \"$a|$b\"",
    "printf 'l1\\nl2\\n' | while read l; do echo \"<$l>\"; done",
    "printf 'a\\\\tb\\n' | { read -r x; printf '%s' \"$x\" | wc -c | tr -d ' '; }",
    "read x < /dev/null; echo $?",
    "printf '%s-%d-%x-%5s-%-5s|%05d|%c\\n' a 42 255 r l 42 xyz",
    "printf '%s\\n' a b c; printf '%b' 'x\\ny\\n'; printf '100%%\\n'; printf '%d\\n' 0x10",
    "printf 'no newline'",
    "test 1 -lt 2; echo $?; [ a = b ]; echo $?; [ -z '' ]; echo $?; [ -n '' ]; echo $?; [ ! -e x ]; echo $?",
    "[ 1 -eq 1 -a 2 -eq 2 ]; echo $?; [ 1 -eq 2 -o 2 -eq 2 ]; echo $?; [ \\( a = a \\) ]; echo $?",
    "touch f; [ -f f ] && [ ! -d f ] && [ -e f ] && echo ok; mkdir d; [ -d d ] && echo dir; [ -s f ] || echo empty",
    "mkdir -p a/b/c; ls a; ls a/b; rmdir a/b/c; ls a/b; rm -r a; ls",
    "echo x > a; cp a b; mv b c; cat c; ls; rm a c; ls",
    "echo x > a; ln a b; echo y > b; cat a; ln -s a s; cat s; readlink s",
    "touch f; chmod 640 f; stat -c %a f; chmod u+x,o=r f; stat -c '%a %s' f",
    "umask 077; touch f; stat -c %a f; umask",
    "printf 12345 > f; stat -c %s f; head -c 2 f; tail -c 2 f; echo",
    "printf 'a\\nb\\nc\\n' > f; head -n 1 f; tail -n 1 f; tail -n +2 f",
    "basename /a/b.c .c; dirname /a/b/c; basename x/; dirname x",
    "echo hello | tr -d l; echo aabbcc | tr -s ab; echo abc | tr a-c x-z; echo 'A B' | tr '[:upper:]' '[:lower:]'",
    "printf '3\\n10\\n2\\n' | sort -n; printf 'b\\na\\nb\\n' | sort -u; printf 'a\\nc\\nb\\n' | sort -r",
    "echo data | tee f1 f2; cat f1 f2",
    "printf hello | cksum",
    "dd if=/dev/zero of=z bs=1024 count=3 2>/dev/null; stat -c %s z; printf abcdef | dd bs=1 skip=2 count=2 2>/dev/null; echo",
    "seq 3; seq 2 4; seq 10 -5 0",
    "echo -n a; echo b; env -i A=1 /bin/sh -c 'echo $A' 2>/dev/null",
    "echo a | grep_is_not_there 2>/dev/null; echo $?",
    "exec 3> f; echo to3 >&3; exec 3>&-; cat f",
    "exec > f; echo hidden; exec >&2; cat f 2>/dev/null",
    "{ echo a; echo b; } | { read x; read y; echo $y $x; }",
    "cat nosuch f 2>/dev/null; echo $?",
    "x=$(printf 'a\\nb'); echo \"$x\" | wc -l | tr -d ' '",
    "f() { if [ $1 -gt 0 ]; then echo $1; f $(($1 - 1)); fi; }; f 4",
    "a=1 b=2; a=$b b=$a; echo $a $b",
    "echo ~ | tr -d '\\n' | wc -l | tr -d ' '; HOME=/h; echo ~ ~/x '~' a~",
    "echo \"a\\\"b\" 'a\"b' \"a'b\" \"\\$x\"; printf '%s.' \"\\\\\" \"\\n\"",
    "echo a\\\nb; echo 'a\nb'",
    "# comment\necho x # trailing\necho 'a # b' c#d",
    "echo start; if true; then\n  echo multi\nfi\nfor i in 1 2\ndo\n  echo $i\ndone",
    "if true; then :; fi; : > f; [ -e f ] && echo made",
    "cd /nosuch 2>/dev/null; echo $?; mkdir d; cd d; basename $(pwd); cd ..; cd - > /dev/null; basename $PWD",
    "kill -0 $$; echo $?; kill -0 999999 2>/dev/null; echo $?",
    "command -v cd; command -v nosuch_thing; echo $?; command echo hi",
    "echo $#; echo \"$-\" | tr -d 'a-zA-Z' | wc -c | tr -d ' '",
    "true | false; echo $?; false | true; echo $?",
    "(echo a; exit 5) | cat; echo $?",
    "echo ${x:?unset message} 2>/dev/null; echo not here",
    "fi",
    "if true; then echo x",
    "echo ok; echo 'unterminated",
    "echo 1; )",
    "x=5; x=$((x*x)); echo $x; : $((y = x + 1)); echo $y",
    "echo $((1/0)) 2>/dev/null; echo no",
    "while read -r a b; do echo \"$b-$a\"; done <<E\n1 2\n3 4 5\nE",
    "set -- $(echo 1 2 3); echo $3$2$1; echo ${10} ${1}0",
    "unset -f f; f() { echo one; }; f; unset -f f; f 2>/dev/null; echo $?",
    "wait; echo $?; wait 99999; echo $?",
    "a() { return; }; false; a; echo $?; b() { false; return; }; b; echo $?",
    "echo $? `false` $?; x=`exit 3`; echo $?",
];

fn on_host(script: &str) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("/bin/sh")
        .args(["-c", script])
        .env_clear()
        .env("PATH", "/bin:/usr/bin")
        .current_dir(dir.path())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Ran {
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
        status: output.status.code().unwrap_or(-1),
    }
}

#[test]
#[allow(clippy::print_stderr)]
fn scripts_do_what_they_do_on_the_host() {
    if !Path::new("/bin/sh").exists() {
        eprintln!("skipped: there is no /bin/sh here to compare with");
        return;
    }
    let mut differing = Vec::new();
    for script in SCRIPTS {
        let mut os = boot();
        sh(&mut os, "mkdir /tmp/w");
        let ours = sh(&mut os, &format!("cd /tmp/w\n{script}"));
        let theirs = on_host(script);
        // The wording of messages is BusyBox's here and another one's there.
        if (&ours.stdout, ours.status) != (&theirs.stdout, theirs.status) {
            differing.push(format!("{script}\n  ours:   {ours:?}\n  theirs: {theirs:?}"));
        }
    }
    assert!(differing.is_empty(), "{} differ:\n{}", differing.len(), differing.join("\n"));
}
