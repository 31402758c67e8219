-- What concerns waiters, for the scripts that need it: docs/protocol.md tells the states and messages. One function, whose
-- branches cost nothing until they are taken. `text` is the time in us, if it was asked for already.
-- The fence of a lock that has a line has a ! after its digits, and the lock's value has one after the claim id. A fence may
-- go on with ~ and a time in seconds: until then there may be tombstones. A plain fence says that there is neither.
local function line(what, text, lock, fence, claim, value, wish, ttl, record)
  local call, pcall, match, sub = redis.call, redis.pcall, string.match, string.sub
  local at = string.find(fence, '}:fence:', 1, true)
  local before, after = sub(fence, 1, at), sub(fence, at + 8)
  -- The line, a list of `1 <claim> <process> <ttl ms> <tokens> <since us> <record>`; and when each process was heard of, a
  -- hash of `<us> <ms that it counts as alive> <attempt>`.
  local queue, alive = before .. ':queue:' .. after, before .. ':alive:' .. after
  if not text then
    local time = call('TIME')
    text = time[1] .. sub('00000' .. time[2], -6)
  end
  local now = tonumber(text)

  -- The last token, if known; the marks after it; and whether the key holds something else.
  local function last_token()
    local last = pcall('GET', fence)
    if not last then return nil, '', false end
    local digits, marks = match(type(last) == 'string' and last or '', '^(%d+)(!?~?%d*)$')
    return tonumber(digits), marks or '', not digits
  end
  -- The marks as they are to be now: ! if there is a line, and until when there may be tombstones.
  local function marks_of(marks, has_line)
    local ends = marks ~= '' and match(marks, '~(%d+)')
    if ends and ends * 1000000 > now then return (has_line and '!~' or '~') .. ends end
    return has_line and '!' or ''
  end
  local function whole(number) return string.format('%.0f', number) end
  -- The error for a key of the line that holds something else.
  local function strange_line(error)
    return sub(error.err, 1, 9) == 'WRONGTYPE' and redis.error_reply('BADQUEUE line') or error
  end
  -- Where a claim stands, counted from 0, and its entry.
  local function find(wanted)
    local entries = pcall('LRANGE', queue, 0, -1)
    for i = 1, #entries do
      if sub(entries[i], 3, 34) == wanted then return i - 1, entries[i] end
    end
  end

  if what == 'enqueue' then
    -- Puts a claim in line behind whoever has the lock (its value is given), or finds it there. Answers how many are ahead
    -- and since when it stands there; or an error.
    local tokens, process, window, attempt, limit, again = match(wish, '^(%d+) (%S+) (%d+) (%d+) (%S+)( ?a?)$')
    local ahead, since, pushed = nil, text, false
    if again ~= '' then
      local entry
      ahead, entry = find(claim)
      if ahead then
        since = match(entry, '^1 %x+ %S+ %d+ %d+ (%d+)')
        local caller, rest = match(entry, '^1 %x+ (%S+)(.*)$')
        if caller ~= process then
          -- It was put in line at another node, before the slot came to this one: from now on it is called here.
          local moved = pcall('LSET', queue, ahead, '1 ' .. claim .. ' ' .. process .. rest)
          if moved.err then return strange_line(moved) end
        end
      end
    end
    if not ahead then
      local length = limit ~= '-' and pcall('LLEN', queue)
      if type(length) == 'number' and length >= tonumber(limit) then return redis.error_reply('QUEUEFULL ' .. length) end
      if #ttl > 5 or tonumber(ttl) > 30000 then ttl = '30000' end
      local entry = '1 ' .. claim .. ' ' .. process .. ' ' .. ttl .. ' ' .. tokens .. ' ' .. text .. ' ' .. record
      length = pcall('RPUSH', queue, entry)
      if type(length) == 'table' then return strange_line(length) end
      ahead, pushed = length - 1, true
      if ahead == 0 or not value or sub(value, 37, 37) ~= '!' then
        if value and sub(value, 1, 4) == 'lh1:' and sub(value, 37, 37) == ':' then call('SETRANGE', lock, 36, '!') end
        local last, marks, strange = last_token()
        if last then
          if sub(marks, 1, 1) ~= '!' then call('SET', fence, whole(last) .. marks_of(marks, true), 'KEEPTTL') end
        elseif not strange then
          call('SET', fence, '0!', 'PX', 90000000)
        end
      end
    end
    local heard = pcall('HSET', alive, 'p' .. process, text .. ' ' .. window .. ' ' .. attempt)
    if type(heard) == 'table' then
      if pushed then call('RPOP', queue) end
      return strange_line(heard)
    end
    if ahead == 0 or heard == 1 then
      -- Nothing of it outlives its processes by much; a process that is heard of for the first time (those before it may
      -- all be dead), or again, makes it last.
      local kept = math.max(60000, window * 4)
      call('PEXPIRE', queue, kept)
      call('PEXPIRE', alive, kept)
    end
    return ahead, since
  end

  if what == 'hand over' then
    -- Hands the lock, whose key is free or the caller's to overwrite, to the first in line who can be reached. The claim,
    -- if one is given, is being presented in this very call and needs no message. Answers the claim that has it, or
    -- nothing: then the key is as it was, or gone.
    local last, marks, strange = last_token()
    if strange then return end
    local looked, silent, deaf, kept, winner = 0, 0, {}, {}, nil
    while not winner and looked < 1000 and silent < 16 do
      looked = looked + 1
      local entry = pcall('LPOP', queue)
      if type(entry) ~= 'string' then break end
      local first, process, lease, tokens, theirs = match(entry, '^1 (%x+) (%S+) (%d+) (%d+) %d+ (.*)$')
      local heard = process and pcall('HGET', alive, 'p' .. process)
      local since, window, attempt = match(type(heard) == 'string' and heard or '', '^(%d+) (%d+) (%d+)$')
      if type(heard) == 'table' then
        -- No hash of ours: whoever asks is told so.
        kept[#kept + 1] = entry
        break
      elseif not process or (deaf[process] and first ~= claim) then
        -- Of a version that we do not know, and left to those who do; or known not to listen.
        kept[#kept + 1] = entry
      elseif first == claim or (since and since + window * 1000 > now) then
        local token, token_text = now, text
        if last and last >= now then token, token_text = last + 1, whole(last + 1) end
        local same_hour = last and last - last % 3600000000 == now - now % 3600000000
        last = token + tokens - 1
        local more = kept[1] ~= nil or call('LLEN', queue) > 0
        local fence_text = (tokens == '1' and token_text or whole(last)) .. marks_of(marks, more)
        local set
        -- The fence first: if there is no memory for the lock, a number is lost and nothing else.
        if last > 9007199254740991 then
          set = {err = 'used up'}
        elseif same_hour and last <= now + 3600000000 then
          set = pcall('SET', fence, fence_text, 'KEEPTTL')
        else
          set = pcall('SET', fence, fence_text, 'PX', whole(90000000 + (last - now) / 1000))
        end
        if not set.err then
          local mark = more and '!' or ':'
          set = pcall('SET', lock, 'lh1:' .. first .. mark .. token_text .. ':' .. theirs, 'PX', lease)
        end
        if set.err then
          kept[#kept + 1] = entry
          break
        end
        local reached = first == claim
        if not reached then
          local grant = '1 ' .. first .. ' ' .. token_text .. ' ' .. lease .. ' ' .. attempt .. ' ' .. lock
          -- In a cluster a message goes to every node, also to one that the process listens at no more: who is not here is
          -- not told at all, or it would take for granted what the next in line is given.
          local here = true
          if sub(process, 1, 15) == 'leasehold:node:' then
            local listening = pcall('PUBSUB', 'NUMSUB', process)
            here = not listening.err and listening[2] > 0
          end
          local ears = here and pcall('PUBLISH', process, grant)
          reached = type(ears) == 'number' and ears > 0
        end
        if reached then
          winner = first
          if not more then call('DEL', alive) end
        else
          -- Nobody listens just now, but it may come back: it keeps its place, and the next one is tried.
          deaf[process], silent = true, silent + 1
          kept[#kept + 1] = entry
          call('DEL', lock)
        end
      end
    end
    for i = #kept, 1, -1 do call('LPUSH', queue, kept[i]) end
    if kept[1] then
      -- Perhaps it was tried as the last in line, and the fence now says that there is none.
      last, marks = last_token()
      if last and sub(marks, 1, 1) ~= '!' then call('SET', fence, whole(last) .. marks_of(marks, true), 'KEEPTTL') end
      local ends = call('PTTL', alive)
      call('PEXPIRE', queue, ends > 0 and ends or 60000)
    elseif not winner and call('EXISTS', queue) == 0 then
      call('DEL', alive)
    end
    return winner
  end

  if what == 'in turn' then
    -- The last token is not known, or is marked: there may be tombstones, or a line that comes first. Answers an error, or
    -- the last token and its marks.
    local last, marks, strange = last_token()
    if strange then return redis.error_reply('BADFENCE token') end
    local tombstone = before .. ':gone:' .. after .. ':' .. claim
    if not (last and marks_of(marks, false) == '') and call('EXISTS', tombstone) == 1 then
      return redis.error_reply('WITHDRAWN claim')
    end
    local has_line = call('EXISTS', queue) == 1
    if has_line and not value then
      if string.find(wish, ' ', 1, true) then
        local ahead = line('enqueue', text, lock, fence, claim, nil, wish, ttl, record)
        if type(ahead) == 'table' then return ahead end
      end
      -- Nobody there, not even the asker, if a great many before it keep silent: then it need not stand in line.
      if not line('hand over', text, lock, fence, claim) then line('leave', text, lock, fence, claim) end
      last, marks = last_token()
      has_line = call('EXISTS', queue) == 1
    end
    return nil, last, marks_of(marks, has_line)
  end

  if what == 'leave' then
    -- Takes a claim out of the line; its entry, if that is known, is given as the value. Where it is not, a late request may
    -- have put the claim in line twice.
    local entry = value
    if not entry then
      local _, found = find(claim)
      entry = found
    end
    local left = 0
    while entry do
      local removed = pcall('LREM', queue, 1, entry)
      if type(removed) ~= 'number' or removed == 0 then break end
      left = left + removed
      entry = nil
      if not value then
        local _, found = find(claim)
        entry = found
      end
    end
    if left > 0 and call('EXISTS', queue) == 0 then call('DEL', alive) end
    return
  end

  if what == 'forbid' then
    -- Forbids a claim for an hour, and says so on the fence. Answers an error, or nothing.
    local set = pcall('SET', before .. ':gone:' .. after .. ':' .. claim, '', 'PX', 3600000)
    if set.err then return set end
    local last, marks, strange = last_token()
    if strange then return end
    local ends = '~' .. whole(math.floor(now / 1000000) + 3601)
    local marked = whole(last or 0) .. (sub(marks, 1, 1) == '!' and '!' or '') .. ends
    if last then set = pcall('SET', fence, marked, 'KEEPTTL') else set = pcall('SET', fence, marked, 'PX', 90000000) end
    return set.err and set or nil
  end

  -- 'refresh': a process is heard of, and a free lock handed on. `wish` is process, ms that it counts as alive, attempt; the
  -- claims follow in a list as `record`. Answers how many are ahead of each (-1 is not in line), or an error.
  local ranks, there = {}, call('EXISTS', queue) == 1
  if there then
    local process, window, attempt = match(wish, '^(%S+) (%d+) (%d+)$')
    local heard = pcall('HSET', alive, 'p' .. process, text .. ' ' .. window .. ' ' .. attempt)
    if type(heard) == 'table' then return strange_line(heard) end
    local kept = math.max(60000, window * 4)
    call('PEXPIRE', queue, kept)
    call('PEXPIRE', alive, kept)
    if not value then
      local _, _, strange = last_token()
      if strange then return redis.error_reply('BADFENCE token') end
      line('hand over', text, lock, fence)
    elseif sub(value, 1, 4) == 'lh1:' and sub(value, 37, 37) == ':' then
      call('SETRANGE', lock, 36, '!')
    end
    local entries = pcall('LRANGE', queue, 0, -1)
    if entries.err then return strange_line(entries) end
    for i = 1, #entries do ranks[sub(entries[i], 3, 34)] = i - 1 end
    local last, marks, strange = last_token()
    if entries[1] and not strange and sub(marks, 1, 1) ~= '!' then
      local marked = whole(last or 0) .. marks_of(marks, true)
      if last then call('SET', fence, marked, 'KEEPTTL') else call('SET', fence, marked, 'PX', 90000000) end
    end
  end
  for i = 1, #record do record[i] = ranks[record[i]] or -1 end
  return record
end
